"""Linears over codes, and the way parts of a linear become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.quant.codes import Codes, arranged
from kvrun.quant.dense import DenseLinear
from kvrun.quant.format import QuantizedLinear
from kvrun.quant.made import INT8, encoded


class CodedLinear:
    """A weight as packed codes."""

    def __init__(self, codes: Codes, in_features: int, rounded: torch.dtype | None = None) -> None:
        """The codes are not kept beside their packed form. `rounded`: inputs become such numbers where the kernel takes them."""
        self._hold([codes], len(codes.values), in_features, rounded)

    @classmethod
    def of(cls, parts: Iterable[Codes], out_features: int, in_features: int, rounded: torch.dtype | None = None) -> CodedLinear:
        """One whose codes come some rows at a time, all of one form; never held in full beside their packed form."""
        made = cls.__new__(cls)
        made._hold(parts, out_features, in_features, rounded)
        return made

    def _hold(self, parts: Iterable[Codes], out_features: int, in_features: int, rounded: torch.dtype | None) -> None:
        parts = iter(parts)
        first = next(parts)
        rows = (ops.CodedRows(part.values, part.scales, part.offsets, part.units) for part in chain([first], parts))
        self.packed = ops.pack_quantized_rows(rows, out_features, group=first.group, table=first.table)
        self._rounded = rounded is not None and self.packed.narrow == rounded
        self._order, self._in_features = first.order, in_features

    @property
    def nbytes(self) -> int:
        """See QuantizedLinear."""
        return self.packed.nbytes

    @property
    def rounded(self) -> torch.dtype | None:
        """See QuantizedLinear."""
        return self.packed.narrow if self._rounded else None

    @property
    def ordered(self) -> bool:
        """Whether codes lie in another order than the inputs."""
        return self._order is not None

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]"""
        return ops.quantized_linear(self.arranged(x), self.packed, bias, rounded=self._rounded)

    def arranged(self, x: Tensor) -> Tensor:
        """Inputs in the order in which the packed codes lie. x [T, in] -> [T, packed.in_features]"""
        return x if self._order is None else arranged(x, self._order)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` of the weight, [ids, in] float32: an embedding looks them up."""
        return self._in_order(self.packed.rows(ids))

    def dense(self) -> Tensor:
        """The weight that the codes stand for, [out, in] float32."""
        return self._in_order(self.packed.dense())

    def of_plain(self, plain: Tensor) -> Tensor:
        """See QuantizedLinear; known of int8 with a scale for each output, as kv.run makes them."""
        if self.packed.codes != torch.int8:
            return plain
        codes = encoded(plain, INT8)
        return codes.values * codes.scales

    def _in_order(self, rows: Tensor) -> Tensor:
        if self._order is None:
            return rows
        there = self._order >= 0
        out = rows.new_empty((len(rows), self._in_features))
        out[:, self._order[there]] = rows[:, there]
        return out


class Stacked:
    """Weights that share inputs and nothing else, one below the other."""

    def __init__(self, parts: Sequence[QuantizedLinear], sizes: Sequence[int]) -> None:
        self._parts, self._sizes = tuple(parts), list(sizes)

    @property
    def nbytes(self) -> int:
        """See QuantizedLinear."""
        return sum(part.nbytes for part in self._parts)

    @property
    def rounded(self) -> torch.dtype | None:
        """See QuantizedLinear."""
        return next((part.rounded for part in self._parts if part.rounded), None)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]"""
        biases = [None] * len(self._parts) if bias is None else bias.split(self._sizes)
        return torch.cat([part.matmul(x, b) for part, b in zip(self._parts, biases, strict=True)], dim=1)

    def of_plain(self, plain: Tensor) -> Tensor:
        """See QuantizedLinear."""
        return plain

    def dense(self) -> Tensor:
        """All of them, [out, in] float32."""
        return torch.cat([part.dense().float() for part in self._parts])


def build(parts: Sequence[Codes | Tensor], in_features: int, dtype: torch.dtype, rounded: torch.dtype | None = None) -> QuantizedLinear:
    """One linear of its parts' rows below each other; plain parts take `dtype`, inputs of coded ones the 8 bits of `rounded`."""
    sizes = [len(part.values if isinstance(part, Codes) else part) for part in parts]
    if len(parts) == 1:
        (part,) = parts
        return CodedLinear(part, in_features, rounded) if isinstance(part, Codes) else DenseLinear(part.to(dtype))
    plain = [part for part in parts if isinstance(part, Tensor)]
    if len(plain) == len(parts):
        return DenseLinear(torch.cat([part.to(dtype) for part in plain]))
    coded = [part for part in parts if isinstance(part, Codes)]
    if len(coded) == len(parts) and all(_alike(coded[0], other) for other in coded[1:]):
        return CodedLinear.of(coded, sum(sizes), in_features, rounded)
    return Stacked([build([part], in_features, dtype, rounded) for part in parts], sizes)


def _alike(a: Codes, b: Codes) -> bool:
    """Whether two weights that share inputs can lie in one."""
    same = a.values.dtype == b.values.dtype and a.scales.dtype == b.scales.dtype and a.group == b.group
    pairs = ((a.offsets, b.offsets), (a.units, b.units), (a.table, b.table), (a.order, b.order))
    if not same or any((x is None) != (y is None) for x, y in pairs):
        return False
    if a.offsets is not None and b.offsets is not None and a.offsets.dtype != b.offsets.dtype:
        return False
    if a.units is not None and b.units is not None and a.units.shape[1] != b.units.shape[1]:
        return False
    return all(x is None or y is None or torch.equal(x, y) for x, y in pairs[2:])
