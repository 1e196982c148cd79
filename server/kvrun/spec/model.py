"""A whole model as a value: embed, a list of layers, head. Nothing here computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvrun.spec.mixers import Mixer
from kvrun.spec.norms import Norm
from kvrun.spec.positions import Learned


@dataclass(frozen=True, init=False)
class Residual:
    """x <- x + the sum of mixer(norm(x)) over its mixers"""

    norm: Norm
    mixers: tuple[Mixer, ...]

    def __init__(self, norm: Norm, *mixers: Mixer) -> None:
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "mixers", mixers)


@dataclass(frozen=True, init=False)
class Parallel:
    """Residuals that all read the same x: x <- x + the sum of what each would add"""

    residuals: tuple[Residual, ...]

    def __init__(self, *residuals: Residual) -> None:
        object.__setattr__(self, "residuals", residuals)


Step = Residual | Parallel


@dataclass(frozen=True)
class Layer:
    """One layer; the names of its parts are relative to `at`."""

    at: str  # "model.layers.3"
    steps: tuple[Step, ...]


def stack(count: int, at: str, steps: Sequence[Step] | Callable[[int], Sequence[Step]]) -> tuple[Layer, ...]:
    """`count` layers named by `at`, whose {i} is the layer's number; `steps` may be a function of that number."""
    return tuple(Layer(at.format(i=i), tuple(steps(i) if callable(steps) else steps)) for i in range(count))


@dataclass(frozen=True)
class Embed:
    """A table of `vocabulary` rows of `hidden` numbers."""

    name: str
    vocabulary: int
    hidden: int
    position: Learned | None = None


@dataclass(frozen=True)
class Head:
    """Logits from the last hidden state. Tied: a checkpoint without the head's own tensor means the embedding's."""

    norm: Norm
    name: str
    tied: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Decoder:
    """embed -> layers -> head"""

    embed: Embed
    layers: tuple[Layer, ...]
    head: Head


@dataclass(frozen=True)
class Model:
    """Everything a checkpoint's config says about what to compute."""

    decoder: Decoder
    positions: int  # longest sequence; 0 = no limit of its own
    leftovers: tuple[str, ...] = ()  # regular expressions of tensors that checkpoints carry and nobody needs
