"""Packed weights that one call multiplies with rows of their own: the experts of a mixture, and where each of them lies."""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES


class Packed(Protocol):
    """A packed weight, as far as a table of many needs to know it."""

    in_features: int
    out_features: int

    @property
    def form(self) -> Hashable:
        """What weights of one table agree in; None for one that no table serves."""

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """The tensors that a kernel reads, in the order of the table's columns."""


P = TypeVar("P", bound=Packed)


def owned(x: Tensor, bounds: Sequence[int]) -> list[tuple[int, Tensor]]:
    """The groups that have rows, and their rows: group g those from bounds[g] to bounds[g + 1]."""
    return [(group, x[start:stop]) for group, (start, stop) in enumerate(pairwise(bounds)) if start < stop]


class Grouped(Generic[P]):
    """A weight, and a bias or none, for each group of rows; `table` says where they lie, if they are of one form."""

    __slots__ = ("biases", "first", "packed", "table")

    def __init__(self, packed: Sequence[P], biases: Sequence[Tensor] | None = None):
        """biases: [out_features] per group. The tensors are kept; they must not be moved or replaced."""
        self.packed = tuple(packed)
        self.biases = None if biases is None else tuple(biases)
        self.first = packed[0]
        self.table = self._addresses()  # [groups, parts + 1] int64, the bias last, 0 for what is not there

    def __len__(self) -> int:
        return len(self.packed)

    def bias(self, group: int) -> Tensor | None:
        """What is added to a group's rows."""
        return None if self.biases is None else self.biases[group]

    @property
    def bias_dtype(self) -> torch.dtype | None:
        """The dtype of the biases where `table` is there."""
        return None if self.biases is None else self.biases[0].dtype

    def check(self, x: Tensor) -> None:
        """ValueError unless x is rows of what the weights take."""
        if x.dim() != 2 or x.shape[1] != self.first.in_features:
            raise ValueError(f"x of shape [rows, {self.first.in_features}] asked, found {list(x.shape)}; reshape it first")

    def bounds(self, x: Tensor, offsets: Tensor) -> list[int]:
        """The rows' bounds, offsets that rise from 0 to the number of rows. ValueError says what else they are."""
        bounds: list[int] = offsets.tolist()
        if len(bounds) != len(self) + 1 or bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
            raise ValueError(f"{len(self) + 1} rising offsets from 0 to {len(x)} asked, found {bounds}; sort the rows by group")
        return bounds

    def _addresses(self) -> Tensor | None:
        biases = self.biases or ()
        alike = {(p.form, p.in_features, p.out_features) for p in self.packed}
        read = all(b.dtype in DTYPES and b.dtype == biases[0].dtype and b.stride(-1) == 1 for b in biases)
        if self.first.form is None or len(alike) > 1 or not read:
            return None
        held = [(*p.parts, self.bias(g)) for g, p in enumerate(self.packed)]
        device = next(part.device for part in held[0] if part is not None)
        return torch.tensor([[0 if part is None else part.data_ptr() for part in parts] for parts in held], dtype=torch.int64).to(device)
