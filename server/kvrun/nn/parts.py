"""What a kind of mixer is given to become a module of this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor

from kvrun.attention.backend import Kind
from kvrun.dist import Group
from kvrun.errors import Unsupported
from kvrun.nn.linear import Linear, Source
from kvrun.nn.positions import RotaryTable
from kvrun.nn.step import Mixer, Reader
from kvrun.quant.format import QuantizedLinear
from kvrun.spec import Rope
from kvrun.spec import mixers as spec
from kvrun.state.shapes import PageLayers, PageShape, PageUse, SlotShape
from kvrun.weights.split import Split

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


@dataclass
class Shared:
    """What the mixers of one model have in common while it is built."""

    split: Split
    group: Group
    dtype: torch.dtype
    rotaries: dict[Rope, RotaryTable] = field(default_factory=dict)
    pages: PageLayers = field(default_factory=PageLayers)
    slots: list[SlotShape] = field(default_factory=list)  # one per array of a recurrent state
    readers: list[Reader] = field(default_factory=list)  # of what an encoder makes, in the order of the layers
    linears: list[Linear] = field(default_factory=list)  # every linear that adapters may change, by site
    kinds: list[Kind] = field(default_factory=list)  # of every mixer that attends to pages

    def linear(
        self, role: str, sources: tuple[Source, ...], weight: QuantizedLinear, bias: Tensor | None, out_features: int, in_features: int
    ) -> Linear:
        """A linear that adapters find by its sources."""
        self.linears.append(Linear(len(self.linears), role, sources, weight, bias, out_features, in_features))
        return self.linears[-1]

    def rotary(self, rope: Rope) -> RotaryTable:
        """The table of a rotary embedding; layers that rotate alike share it."""
        if rope not in self.rotaries:
            self.rotaries[rope] = RotaryTable(rope)
        return self.rotaries[rope]

    def page_layer(self, shape: PageShape, use: PageUse = PageUse.SEQUENCE) -> int:
        """A layer of the page pool for one more mixer that keeps keys and values."""
        return self.pages.take(shape, use)

    def slot_layers(self, shapes: Sequence[SlotShape]) -> tuple[int, ...]:
        """Layers of the slots for the arrays of one more mixer that carries a state along."""
        self.slots += shapes
        return tuple(range(len(self.slots) - len(shapes), len(self.slots)))


@dataclass(frozen=True)
class Folded:
    """A matrix that a module takes apart and makes others of."""

    weight: Tensor  # [out, in] of this rank
    source: Source


@dataclass(frozen=True)
class Parts:
    """This rank's share of one mixer, by the names of its plan."""

    linears: Mapping[str, Linear]
    tables: Mapping[str, Tensor]
    pages: PageShape | None
    slots: tuple[SlotShape, ...]
    shared: Shared
    folded: Mapping[str, Folded] = field(default_factory=dict)


@singledispatch
def build_mixer(mixer: spec.Mixer, parts: Parts) -> Mixer:
    """The module of a described mixer. Every kind registers its own in `mixers/`."""
    raise TypeError(f"no module for a {type(mixer).__name__}")


def activation(name: str) -> str:
    """The kernels' name of an activation that configs know by several names. Raises Unsupported."""
    if name not in ACTIVATIONS:
        raise Unsupported(f"activation {name} is not served; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
