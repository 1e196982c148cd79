"""What the parts of a model share while one batch passes through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvrun.attention.backend import AttentionStep
from kvrun.nn.linear import LinearDelta


@dataclass(frozen=True)
class RecurrentStep:
    """The rows of a batch, and where their sequences keep their states."""

    query_start: Tensor  # [N + 1] int32
    slots: Tensor  # [N] int32
    fresh: Tensor  # [N] bool, whether the sequence begins here
    layers: Sequence[Tensor]  # state.slots.Slots.layers


@dataclass(frozen=True)
class ForwardStep:
    """One batch on its way through the layers."""

    positions: Tensor  # [T] int32
    attention: AttentionStep
    lora: LinearDelta | None
    recurrent: RecurrentStep | None = None
    long: Tensor | None = None  # ForwardBatch.long


class Reader(Protocol):
    """A mixer that reads what an encoder made."""

    def remember(self, memory: Tensor, step: ForwardStep) -> None:
        """Keep keys and values of the encoder's output where this mixer will look for them. memory [T, hidden]"""


Mixer = Callable[[Tensor, ForwardStep], Tensor]  # [T, hidden] -> this rank's share of what to add, a tensor of its own
