"""Normalisations over the hidden width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvrun_kernels import ops
from torch import Tensor

Norm = Callable[[Tensor], Tensor]  # [T, hidden] -> [T, hidden], a new tensor


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) * (weight + offset)"""

    weight: Tensor
    eps: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> a new [T, hidden]"""
        return ops.rms_norm(x, self.weight, self.eps, self.offset)


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * weight + bias"""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> a new [T, hidden]"""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)
