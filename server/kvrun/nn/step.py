"""What the parts of a model share while one batch passes through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvrun.attention.backend import AttentionStep
from kvrun.nn.linear import LinearDelta


@dataclass(frozen=True)
class ForwardStep:
    """One batch on its way through the layers."""

    positions: Tensor  # [T] int32
    attention: AttentionStep
    lora: LinearDelta | None


Mixer = Callable[[Tensor, ForwardStep], Tensor]  # [T, hidden] -> this rank's share of what to add, a tensor of its own
