"""Normalisations over the hidden width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.spec import norms as spec

Norm = Callable[[Tensor], Tensor]  # [T, hidden] or [T, heads, dim] -> the same shape, a new tensor


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


@dataclass(frozen=True)
class Narrowed:
    """A norm of wide hidden states whose result is what the layer computes in."""

    norm: Norm
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] float32 -> a new [T, hidden]"""
        return self.norm(x).to(self.dtype)


@dataclass(frozen=True)
class Gate:
    """tanh(weight) * x"""

    factor: Tensor  # [1] or [hidden]

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> a new [T, hidden]"""
        return x * self.factor


def norm_of(norm: spec.Norm | spec.Gate, vectors: Mapping[str, Tensor]) -> Norm:
    """The module of a described norm with its vectors, "weight" and "bias" where it has them."""
    if isinstance(norm, spec.Gate):
        return Gate(vectors["weight"].flatten().tanh())
    if isinstance(norm, spec.RmsNorm):
        return RmsNorm(vectors["weight"], norm.eps, norm.offset)
    return LayerNorm(vectors.get("weight"), vectors.get("bias"), norm.eps)
