"""Decoding steps on a GPU: their layers, captured once for some numbers of rows, and launched again as one for every step.

The same seam as `recorded.py`, with what a GPU wants otherwise: all is captured before the first step, over tensors that all
captures share, and a step takes the next larger capture, whose other rows are nobody's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from kvrun_kernels.capture import Captures, obstacle
from torch import Tensor

from kvrun.attention.backend import AttentionStep
from kvrun.lora.fixed import FixedAdapters
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.linear import Linear
from kvrun.nn.recorded import is_alike
from kvrun.state.pool import Pool

if TYPE_CHECKING:
    from kvrun.nn.decoder import Decoder

log = logging.getLogger("kvrun.captured")


@dataclass(frozen=True)
class Captured:
    """The layers of so many rows, to be launched again."""

    launch: Callable[[], None]
    adapters: FixedAdapters | None
    attention: AttentionStep


class CapturedSteps:
    """Captures of one model's layers over one pool, without adapters and with them, for each of some numbers of rows.

    Every rank makes the same ones in the same order. What holds addresses for a capture lives as long as this does.
    """

    def __init__(
        self, decoder: Decoder, pool: Pool, positions: int, linears: Sequence[Linear], dtype: torch.dtype, sizes: Sequence[int]
    ) -> None:
        """positions: longest sequence, 0 = as long as the pool · dtype: of adapters · sizes: numbers of rows, at least one"""
        self._decoder, self._pool, self._linears, self._dtype = decoder, pool, linears, dtype
        self._sizes = sorted(sizes)
        kv = pool.kv
        self._longest = min(positions or kv.tokens, kv.tokens)
        # Tables that grow would move, and captures would read the old ones.
        decoder.reach(self._longest)
        self._batch, self._x = self._inputs(self._sizes[-1])
        self._captures = Captures()
        self._kept: dict[bool, dict[int, Captured]] = {adapted: self._all(adapted) for adapted in (False, True)}

    @property
    def sizes(self) -> list[int]:
        """The numbers of rows that are captured, ascending."""
        return sorted(self._kept[False])

    def layers(self, x: Tensor, batch: ForwardBatch) -> Tensor | None:
        """What the decoder's layers make of x [T, hidden], good until the next call; None for a step that no capture holds."""
        kept = self._kept[batch.lora is not None]
        rows = next((size for size in self._sizes if size >= len(x)), 0)
        if rows not in kept or not is_alike(batch):
            return None
        captured = kept[rows]
        if batch.lora is not None and captured.adapters is not None and not captured.adapters.fill(batch.lora):
            return None
        self._fill(x, batch, rows)
        captured.attention.renew(batch)
        captured.launch()
        return self._x[: len(x)]

    def _all(self, adapted: bool) -> dict[int, Captured]:
        """Captures of every size, the largest first: the others find room in the memory that it took."""
        kept: dict[int, Captured] = {}
        for rows in reversed(self._sizes):
            adapters = FixedAdapters(self._linears, rows, self._dtype, self._pool.kv.place) if adapted else None
            run, attention = self._pass(rows, adapters)
            why = obstacle(run)
            if why:
                log.info("decoding steps%s are not captured: %s", " with adapters" * adapted, why)
                return {}
            kept[rows] = Captured(self._captures.capture(run), adapters, attention)
        return kept

    def _pass(self, rows: int, adapters: FixedAdapters | None) -> tuple[Callable[[], None], AttentionStep]:
        b = self._batch
        batch = replace(
            b,
            ids=b.ids[:rows],
            positions=b.positions[:rows],
            query_start=b.query_start[: rows + 1],
            contexts=b.contexts[:rows],
            page_table=b.page_table[:rows],
            slots=b.slots[:rows],
            wanted=b.wanted[:rows],
            lora=adapters,
        )
        x, attention = self._x[:rows], self._decoder.attention.fixed(batch, self._pool.kv)
        step = replace(self._decoder.step(batch, self._pool), attention=attention)

        def run() -> None:
            for residual in self._decoder.residuals:
                residual(x, step)

        return run, attention

    def _inputs(self, rows: int) -> tuple[ForwardBatch, Tensor]:
        """What every capture reads, as for rows of nobody, and the rows that the embedding makes of them."""
        kv = self._pool.kv

        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=kv.place)

        nothing = torch.zeros(rows, dtype=torch.int64, device=kv.place)
        batch = ForwardBatch(
            ids=nothing,
            positions=full(0, rows),
            query_start=torch.arange(rows + 1, dtype=torch.int32, device=kv.place),
            contexts=full(1, rows),
            page_table=full(self._spare(), rows, -(-self._longest // kv.page_tokens)),
            slots=full(self._spare() * kv.page_tokens, rows),
            wanted=nothing,
            lora=None,
        )
        return batch, self._decoder.enter(batch, self._decoder.step(batch, self._pool)).clone()

    def _fill(self, x: Tensor, batch: ForwardBatch, rows: int) -> None:
        """Put a step's rows in, and after them rows of nobody: one token each, in the page that nobody is granted."""
        to, count = self._batch, len(x)
        self._x[:count].copy_(x)
        to.positions[:count].copy_(batch.positions)
        to.contexts[:count].copy_(batch.contexts)
        to.slots[:count].copy_(batch.slots)
        to.page_table[:count, : batch.page_table.shape[1]].copy_(batch.page_table)
        if count < rows:
            self._x[count:rows].zero_()
            to.positions[count:rows].zero_()
            to.contexts[count:rows].fill_(1)
            to.slots[count:rows].fill_(self._spare() * self._pool.kv.page_tokens)
            to.page_table[count:rows, :1].fill_(self._spare())

    def _spare(self) -> int:
        """The page that nobody is granted."""
        return self._pool.kv.pages
