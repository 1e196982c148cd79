"""Weights as the checkpoint has them, packed once into the panels that the matmul streams."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.quant.format import Axes
from kvrun.weights.plan import Cut, Role

PLAIN = Axes(out=0, inp=1)


class Dense:
    """One number per output and input."""

    unit = 1

    def of(self, module: str, role: Role, held: Collection[str]) -> Dense:
        """See LinearFormat."""
        return self

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        return {"weight": PLAIN}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Tensor:
        """See LinearFormat."""
        return tensors["weight"]


class DenseLinear:
    """A packed weight."""

    rounded = None

    def __init__(self, weight: Tensor) -> None:
        """weight [out, in]; not kept beside its packed form."""
        self.packed = ops.pack_linear(weight.contiguous())

    @classmethod
    def of(cls, rows: Iterable[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> DenseLinear:
        """One whose weight comes some rows at a time, [rows, in] of any type; never held in full beside its packed form."""
        made = cls.__new__(cls)
        made.packed = ops.pack_rows(rows, out_features, in_features, dtype)
        return made

    @property
    def nbytes(self) -> int:
        """See QuantizedLinear."""
        return self.packed.nbytes

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]"""
        return ops.linear(x, self.packed, bias)

    def dense(self) -> Tensor:
        """The weight, [out, in]."""
        return self.packed.dense()

    def of_plain(self, plain: Tensor) -> Tensor:
        """See QuantizedLinear."""
        return plain

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` of the weight, [ids, in]: a tied embedding looks them up in the head's own copy."""
        return self.packed.rows(ids)
