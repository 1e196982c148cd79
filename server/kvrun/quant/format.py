"""What a weight format must offer. A format knows bits and scales; it never knows ranks, layers or adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from kvrun.weights.shard import Axes

__all__ = ["Axes", "LinearFormat", "QuantizedLinear"]


class QuantizedLinear(Protocol):
    """The weight of one linear on this rank, in whatever form its format multiplies with fastest."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> x @ dense().T + bias, [T, out], in x's dtype."""

    def dense(self) -> Tensor:
        """The weight it stands for, [out, in]: the reference of every format's matmul."""


class LinearFormat(Protocol):
    """How a checkpoint stores a linear's weight, and how this rank's share of it becomes something to multiply with."""

    def tensors(self) -> Mapping[str, Axes]:
        """The tensors of one module by suffix ("weight", "scales") with their axes; the loader cuts and joins by them."""

    def build(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> QuantizedLinear:
        """A linear from this rank's tensors, already cut and joined, for inputs of `dtype`."""
