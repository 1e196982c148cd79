"""Normalisations over the hidden width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvrun_kernels import ops
from torch import Tensor

from kvrun.spec import norms as spec

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


def norm_of(norm: spec.Norm, vectors: Mapping[str, Tensor]) -> Norm:
    """The module of a described norm with its vectors, "weight" and "bias" where it has them."""
    if isinstance(norm, spec.RmsNorm):
        return RmsNorm(vectors["weight"], norm.eps, norm.offset)
    return LayerNorm(vectors.get("weight"), vectors.get("bias"), norm.eps)
