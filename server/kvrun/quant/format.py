"""What a weight format must offer. A format knows bits and scales; it never knows ranks, layers or adapters."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class QuantizedLinear(Protocol):
    """The weight of one linear on this rank, in whatever form its format multiplies with fastest."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> x @ dense().T + bias, [T, out], in x's dtype."""

    def dense(self) -> Tensor:
        """The weight it stands for, [out, in]: the reference of every format's matmul."""
