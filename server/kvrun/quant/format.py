"""What a weight format must offer. A format knows bits and scales; it never knows ranks, layers or adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from kvrun.quant.codes import Codes
from kvrun.weights.plan import Cut, Role
from kvrun.weights.shard import WHOLE, Axes, Blocks, Flat, Stretch

__all__ = ["WHOLE", "Axes", "Blocks", "Flat", "LinearFormat", "QuantizedLinear"]


class QuantizedLinear(Protocol):
    """The weight of one linear on this rank, in whatever form it is multiplied with fastest."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def rounded(self) -> torch.dtype | None:
        """The numbers of 8 bits that some of what it multiplies is rounded to first; None where all of it stays as it is."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> x @ dense().T + bias, [T, out], in x's dtype."""

    def dense(self) -> Tensor:
        """The weight it stands for, [out, in]: the reference of every format's matmul."""

    def of_plain(self, plain: Tensor) -> Tensor:
        """What would be held of plain numbers [rows, in] if they were loaded as this was; themselves where that is not known."""


class LinearFormat(Protocol):
    """How a checkpoint stores the weight of a module, and what a part of it stands for."""

    unit: int  # outputs or inputs that lie together: a rank's share is a multiple of it where the model leaves a choice

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """The format of one module, of whose tensors the checkpoint holds these suffixes."""

    def tensors(self) -> Mapping[str, Stretch]:
        """The tensors of a module by suffix ("weight", "scales") with their axes; the loader cuts by them."""

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes | Tensor:
        """What the cut of a module stands for, from its tensors as cut: codes with scales, or plain numbers [out, in]."""
