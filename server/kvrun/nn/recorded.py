"""Decoding steps that differ only in their numbers: recorded once, then made again without Python between their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch
from kvrun_kernels.recording import Arena, Recording, can_replay
from torch import Tensor

from kvrun.nn.batch import ForwardBatch
from kvrun.nn.linear import LinearDelta
from kvrun.state.pool import Pool

if TYPE_CHECKING:
    from kvrun.nn.decoder import Decoder

# Batches of the base model whose recordings are kept: of so many different numbers of rows.
KEPT = 64
# What a step may bring along for its layers; whatever else a batch has is made for one step alone.
ALIKE = {"ids", "positions", "query_start", "contexts", "page_table", "slots", "wanted", "lora", "fed", "host"}


class Recordings(Protocol):
    """What earlier steps over a pool left to be made again."""

    @property
    def sizes(self) -> Sequence[int]:
        """The numbers of rows that are there before the first step, ascending; none where steps are recorded as they come."""

    def layers(self, x: Tensor, batch: ForwardBatch) -> Tensor | None:
        """What the decoder's layers make of x [T, hidden]; None where there is nothing to go by."""


@dataclass(frozen=True)
class Recorded:
    """The layers of one step over tensors of its own, to be filled and run again."""

    x: Tensor
    batch: ForwardBatch
    recording: Recording

    def run(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """What the layers make of x [T, hidden]; good until the next run."""
        _fill(self.x, x, self.batch, batch)
        self.recording.replay()
        return self.x


class RecordedSteps:
    """The recordings of one model over one pool. A step is recorded when one of its kind came before."""

    sizes: Sequence[int] = ()

    def __init__(self, decoder: Decoder, pool: Pool, positions: int, place: torch.device) -> None:
        self._decoder, self._pool = decoder, pool
        self._pages = min(-(-positions // pool.kv.page_tokens) or pool.kv.pages, pool.kv.pages)
        self._arena = Arena()
        self._plain: dict[int, Recorded | None] = {}
        # An adapter batch lives for as long as the table keeps it, and its recordings as long as it does.
        self._adapted: WeakKeyDictionary[LinearDelta, dict[int, Recorded | None]] = WeakKeyDictionary()
        self._rows = 0  # of the rotary tables that recordings read
        # Whether steps without and with adapters can be replayed, as far as is known. Ranks meet in PyTorch.
        self._whole = [can_replay(place) and decoder.embed.group.world == 1] * 2

    def layers(self, x: Tensor, batch: ForwardBatch) -> Tensor | None:
        """What the decoder's layers make of x [T, hidden], from a recording; None where there is none to go by."""
        adapted = batch.lora is not None
        if not self._whole[adapted] or not is_alike(batch):
            return None
        self._look_at_rotaries()
        kept = self._plain if batch.lora is None else self._adapted.setdefault(batch.lora, {})
        count = len(x)
        if count not in kept:
            kept[count] = None
            if len(kept) > KEPT:
                del kept[next(iter(kept))]
            return None
        recorded = kept[count]
        if recorded is not None:
            return recorded.run(x, batch)
        kept[count] = recorded = self._record(x, batch)
        # A model computes all its steps of this kind alike: one that needs PyTorch in between always will.
        self._whole[adapted] = recorded.recording.whole
        return recorded.x

    def _record(self, x: Tensor, batch: ForwardBatch) -> Recorded:
        own = replace(
            batch,
            positions=torch.empty_like(batch.positions),
            contexts=torch.empty_like(batch.contexts),
            page_table=torch.zeros((len(x), self._pages), dtype=torch.int32),
            slots=torch.empty_like(batch.slots),
        )
        recorded = Recorded(torch.empty_like(x), own, Recording(self._arena))
        _fill(recorded.x, x, own, batch)
        step = self._decoder.step(own, self._pool)
        with recorded.recording:
            for residual in self._decoder.residuals:
                # All that a residual leaves is in x.
                self._arena.reset()
                residual(recorded.x, step)
        return Recorded(recorded.x, replace(own, lora=None), recorded.recording)

    def _look_at_rotaries(self) -> None:
        rows = sum(rotary.rows for rotary in self._decoder.rotaries)
        if rows != self._rows:
            self._rows = rows
            self._plain.clear()
            self._adapted.clear()


def is_alike(batch: ForwardBatch) -> bool:
    """Whether every row is one token and the batch has only what all such batches have."""
    if len(batch.ids) != len(batch.contexts):
        return False
    return all(getattr(batch, field.name) is None for field in fields(batch) if field.name not in ALIKE)


def _fill(to_x: Tensor, x: Tensor, to: ForwardBatch, batch: ForwardBatch) -> None:
    to_x.copy_(x)
    to.positions.copy_(batch.positions)
    to.contexts.copy_(batch.contexts)
    to.slots.copy_(batch.slots)
    to.page_table[:, : batch.page_table.shape[1]] = batch.page_table
