"""A batch's low-rank updates as a GPU reads them: rows and ranks in tiles of 16, so that nothing is padded to the largest adapter."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvrun_kernels.sgmv.op import LoraSegments

TILE = 16  # rows of a tile, and ranks: what a tensor core takes at least
FIELDS = 7  # numbers of a segment in the table of LoraSegments
ITEM, UPDATE = 4, 7  # numbers of an entry of each kind
ALIGNED = 16  # bytes, of the widest load


class LoraTable:
    """Buffers on the device that say what to compute, of a fixed size and filled in place: a captured CUDA graph sees new contents.

    items [capacity, 4] int64: a tile of rows times at most 16 rows of an A · updates [capacity, 7] int64: a tile of rows and
    all of its B. Entries without rows cost a program that ends at once.
    """

    def __init__(self, segments: LoraSegments, *, items: int = 0, updates: int = 0, columns: int = 0):
        """Make room for `segments`, or for as many items, updates and columns as are asked, and fill in `segments`."""
        entries = list(_entries(segments))
        items = max(items, sum(-(-rank // TILE) for *_, rank, _, _ in entries), 1)
        updates = max(updates, len(entries), 1)
        held = torch.empty(items * ITEM + updates * UPDATE, dtype=torch.int64, device=segments.device)
        aligned = _aligned(segments)
        self._shape(segments.inputs, segments.dtype, aligned, items, updates, max(columns, segments.columns), held)
        self.fill(segments)

    @classmethod
    def over(
        cls, held: torch.Tensor, inputs: int, dtype: torch.dtype, *, aligned: bool, items: int, updates: int, columns: int
    ) -> LoraTable:
        """A table in memory that others fill with what `contents` says: held [room(items, updates)] int64.

        aligned: whether every row of the adapters to come begins at a multiple of `ALIGNED` bytes
        """
        table = cls.__new__(cls)
        table._shape(inputs, dtype, aligned, items, updates, columns, held)
        return table

    @staticmethod
    def room(items: int, updates: int) -> int:
        """How many numbers a table of this size holds."""
        return items * ITEM + updates * UPDATE

    def _shape(self, inputs: int, dtype: torch.dtype, aligned: bool, items: int, updates: int, columns: int, held: torch.Tensor) -> None:
        self.inputs, self.dtype, self.aligned = inputs, dtype, aligned
        self.items, self.updates, self.columns, self.held = items, updates, columns, held
        self.stop = 0

    def fill(self, segments: LoraSegments) -> None:
        """Replace the contents; the buffers stay where they are. ValueError for what has no room or is laid out otherwise."""
        self.held.copy_(torch.frombuffer(self.contents(segments), dtype=torch.int64))
        self.stop = segments.stop

    def contents(self, segments: LoraSegments) -> array[int]:
        """What the table holds for these segments. ValueError for what has no room or is laid out otherwise."""
        other = len(segments) > 0 and (segments.inputs, segments.dtype) != (self.inputs, self.dtype)
        if other or self.aligned > _aligned(segments):
            raise ValueError(
                f"a table over {self.inputs} inputs of {self.dtype} was made{' for aligned adapters' * self.aligned}; found segments over "
                f"{segments.inputs} of {segments.dtype}; make another table for them"
            )
        items, updates = array("q"), array("q")
        for start, rows, a, bt, rank, columns, column in _entries(segments):
            updates.extend((start, rows, bt, rank, columns, column, len(items) // ITEM))
            for first in range(0, rank, TILE):
                items.extend((start, rows, a + first * self.inputs * self.dtype.itemsize, min(TILE, rank - first)))
        found = (len(items) // ITEM, len(updates) // UPDATE, segments.columns)
        if found[0] > self.items or found[1] > self.updates or found[2] > self.columns:
            raise ValueError(f"room for {(self.items, self.updates, self.columns)} items, updates and columns; found {found}; make more")
        items.extend([0] * (self.items * ITEM - len(items)))
        updates.extend([0] * (self.updates * UPDATE - len(updates)))
        return items + updates

    def __len__(self) -> int:
        return self.updates


def _entries(segments: LoraSegments) -> Iterator[tuple[int, ...]]:
    """Every tile of rows of every segment: start, rows, a, bt, rank, columns, column."""
    table = iter(segments.table)
    for start, stop, a, bt, rank, columns, column in zip(*[table] * FIELDS):
        if rank and columns:
            for first in range(start, stop, TILE):
                yield first, min(TILE, stop - first), a, bt, rank, columns, column


def _aligned(segments: LoraSegments) -> bool:
    """Whether every row of every adapter begins where the widest load may."""
    size = segments.dtype.itemsize
    pointers = (*segments.table[2::FIELDS], *segments.table[3::FIELDS], *(columns * size for columns in segments.table[5::FIELDS]))
    return segments.inputs * size % ALIGNED == 0 and all(pointer % ALIGNED == 0 for pointer in pointers)
