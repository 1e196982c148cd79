"""The adapters of a step that is computed again and again at one place: what rows use which of them is filled in before each."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Protocol
from weakref import ref

import torch
from kvrun_kernels import ops
from kvrun_kernels.sgmv.table import ALIGNED, TILE
from torch import Tensor

from kvrun.lora.adapter import Adapter
from kvrun.lora.sites import Site

# Room for every row to have an adapter of this rank at every linear; ranks of one step share the room.
USUAL_RANK = 64


class Batch(Protocol):
    """The adapters of one step: see lora.table.LoraBatch."""

    @property
    def sites(self) -> Mapping[int, ops.LoraSegments]: ...


class FixedAdapters:
    """A table for each linear at one place, read by whatever computes there; `fill` says what they hold.

    Tables of linears are made as the first pass asks for them, and settled once by `settle`.
    """

    def __init__(self, linears: Sequence[Site], rows: int, dtype: torch.dtype) -> None:
        """rows: of a step, one token each · dtype: of the adapters"""
        self._linears, self._rows, self._dtype = linears, rows, dtype
        self._tables: dict[int, ops.LoraTable] = {}
        self._grouped: set[int] = set()  # linears whose rows are known only while a step is computed
        self._held: ref[Batch] | None = None
        self._place = torch.empty(0, dtype=torch.int64)

    @property
    def sites(self) -> Mapping[int, ops.LoraSegments]:
        """None of its own: what the tables hold is a step's."""
        return {}

    def apply(self, site: int, x: Tensor, y: Tensor) -> None:
        """See nn.linear.LinearDelta."""
        if site not in self._tables:
            self._tables[site] = self._table(site, x, y)
        ops.lora(y, x, self._tables[site])

    def apply_grouped(self, sites: Sequence[int], x: Tensor, y: Tensor, offsets: Tensor, tokens: Tensor) -> None:
        """Nothing: a batch that changes these linears has no place here."""
        self._grouped.update(sites)

    def embed(self, ids: Tensor, x: Tensor) -> None:
        """Nothing: embeddings are looked up before."""

    def settle(self) -> None:
        """Lay the tables of all linears that were asked for end to end, so that one copy fills them; none may be asked for later."""
        sizes = [table.held.numel() for table in self._tables.values()]
        if sizes:
            self._place = torch.zeros(sum(sizes), dtype=torch.int64, device=next(iter(self._tables.values())).held.device)
        for table, held in zip(self._tables.values(), self._place.split(sizes), strict=True):
            table.held = held

    def fill(self, batch: Batch) -> bool:
        """Have the tables hold a step's adapters; False where one has no place in them, and nothing is changed."""
        if self._held is not None and self._held() is batch:
            return True
        if not self._grouped.isdisjoint(batch.sites):
            return False
        none, contents = ops.LoraSegments([]), array("q")
        try:
            for site, table in self._tables.items():
                contents += table.contents(batch.sites.get(site, none))
        except ValueError:  # of a larger rank, or laid out otherwise
            return False
        if contents:
            self._place.copy_(torch.frombuffer(contents, dtype=torch.int64))
        self._held = ref(batch)
        return True

    def _table(self, site: int, x: Tensor, y: Tensor) -> ops.LoraTable:
        """An empty table with room for adapters of all rows."""
        widths = [len(source.rows) for source in self._linears[site].sources if len(source.rows)]
        updates = self._rows * len(widths)
        items = updates * -(-USUAL_RANK // TILE)
        aligned = all(width * self._dtype.itemsize % ALIGNED == 0 for width in (x.shape[1], *widths))
        held = torch.zeros(ops.LoraTable.room(items, updates), dtype=torch.int64, device=x.device)
        return ops.LoraTable.over(held, x.shape[1], self._dtype, aligned=aligned, items=items, updates=updates, columns=y.shape[1])


def usual_adapter(linears: Sequence[Site], dtype: torch.dtype, place: torch.device) -> Adapter:
    """An adapter of `USUAL_RANK` that adds nothing to every linear: to see what computing one takes. Its matrices share their memory."""
    shared: dict[int, Tensor] = {}

    def zeros(width: int) -> Tensor:
        return shared.setdefault(width, torch.zeros(USUAL_RANK, width, dtype=dtype, device=place))

    updates = {}
    for linear in linears:
        parts = [source for source in linear.sources if len(source.rows)]
        inputs = [source.in_features if source.cols is None else len(source.cols) for source in parts]
        if parts:
            updates[linear.site] = ops.LoraSegments(
                ops.Segment(0, 0, zeros(width), zeros(len(source.rows)), source.column) for source, width in zip(parts, inputs, strict=True)
            )
    return Adapter("", {}, updates, 0, 0, (USUAL_RANK,), ())
