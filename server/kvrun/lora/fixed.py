"""The adapters of a step that is computed again and again at one place: what rows use which of them is filled in before each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import ref

import numpy as np
import torch
from kvrun_kernels import ops
from kvrun_kernels.sgmv.table import ALIGNED
from torch import Tensor

from kvrun.lora.adapter import Adapter
from kvrun.lora.sites import Site, Source

USUAL_RANK = 64  # of what memory is measured with
MOST_RANK = 256  # that is computed at one place


class Batch(Protocol):
    """The adapters of one step: see lora.table.LoraBatch."""

    @property
    def pointed(self) -> list[tuple[int, int, ops.LoraPointers]] | None: ...
    def arrive(self) -> None: ...


class FixedAdapters:
    """One table at one place for all linears, read by whatever computes there; `fill` says what it holds."""

    def __init__(self, linears: Sequence[Site], rows: int, dtype: torch.dtype, place: torch.device) -> None:
        """rows: of a step, one token each · dtype: of the adapters · place: where the model lies"""
        sizes: np.ndarray = np.zeros((4, len(linears)), np.int64)
        for linear in linears:
            if parts := [(len(source.rows), source.column + len(source.rows), _inputs(source)) for source in _held(linear)]:
                sizes[:, linear.site] = len(parts), *np.max(parts, axis=0)
        widths = {_inputs(source) for linear in linears for source in _held(linear)}
        widths |= {len(source.rows) for linear in linears for source in _held(linear)}
        aligned = all(width * dtype.itemsize % ALIGNED == 0 for width in widths)
        self._table = ops.LoraTable.of_room(rows, MOST_RANK, sizes, dtype, aligned=aligned, place=place)
        self._filled: ref[Batch] | None = None

    @property
    def pointed(self) -> list[tuple[int, int, ops.LoraPointers]] | None:
        """None of its own: what the table holds is a step's."""
        return None

    def arrive(self) -> None:
        """Nothing: `fill` waited."""

    def apply(self, site: int, x: Tensor, y: Tensor) -> None:
        """See nn.linear.LinearDelta."""
        ops.lora(y, x, ops.LoraUse(self._table, ops.LoraSites((site,))))

    def apply_grouped(self, sites: ops.LoraSites, x: Tensor, y: Tensor, tokens: Tensor, offsets: Tensor | None = None) -> None:
        """See nn.linear.LinearDelta."""
        ops.lora(y, x, ops.LoraUse(self._table, sites, tokens, offsets))

    def embed(self, ids: Tensor, x: Tensor) -> None:
        """Nothing: embeddings are looked up before."""

    def fill(self, batch: Batch) -> bool:
        """Have the table hold a step's adapters, and wait for those; False where one has no place in it, and nothing is changed."""
        if self._filled is not None and self._filled() is batch:
            return True
        if batch.pointed is None:
            return False
        try:
            self._table.fill(batch.pointed)
        except ValueError:  # of a larger rank, or laid out otherwise
            return False
        batch.arrive()
        self._filled = ref(batch)
        return True


def _held(linear: Site) -> list[Source]:
    """What of a linear this rank has."""
    return [source for source in linear.sources if len(source.rows)]


def _inputs(source: Source) -> int:
    """Of this rank."""
    return source.in_features if source.cols is None else len(source.cols)


def usual_adapter(linears: Sequence[Site], dtype: torch.dtype, place: torch.device) -> Adapter:
    """An adapter of `USUAL_RANK` that adds nothing to every linear: to see what computing one takes. Its matrices share their memory."""
    shared: dict[int, Tensor] = {}

    def zeros(width: int) -> Tensor:
        return shared.setdefault(width, torch.zeros(USUAL_RANK, width, dtype=dtype, device=place))

    updates = {}
    for linear in linears:
        if parts := _held(linear):
            updates[linear.site] = ops.LoraSegments(
                ops.Segment(0, 0, zeros(_inputs(source)), zeros(len(source.rows)), source.column) for source in parts
            )
    return Adapter("", {}, updates, 0, 0, (USUAL_RANK,), (), pointers=ops.lora_pointers(updates, len(linears)))
