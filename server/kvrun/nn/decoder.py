"""The forward path, the only one: every model is an embedding, a list of residuals and a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvrun.attention.backend import AttentionBackend
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.embedding import Embedding, Head
from kvrun.nn.linear import LinearDelta
from kvrun.nn.positions import RotaryTable
from kvrun.nn.recorded import Recordings
from kvrun.nn.residual import PostNorm, Residual
from kvrun.nn.step import ForwardStep, Reader, RecurrentStep
from kvrun.state.pool import Pool


@dataclass(frozen=True)
class Decoder:
    """Embed, then every residual, then the head."""

    embed: Embedding
    residuals: tuple[Residual | PostNorm, ...]
    head: Head
    attention: AttentionBackend
    rotaries: tuple[RotaryTable, ...]
    wide: bool = False  # residuals add up in float32

    def forward(self, batch: ForwardBatch, pool: Pool, recorded: Recordings | None = None) -> Tensor | None:
        """Compute the batch's tokens, leave their keys, values and states in the pool.

        Returns the wanted logits [S, vocabulary] float32 on rank 0, None elsewhere.
        """
        step = self.step(batch, pool)
        x = self.enter(batch, step)
        found = None if recorded is None else recorded.layers(x, batch)
        if found is None:
            for residual in self.residuals:
                residual(x, step)
        else:
            x = found
        return self.head(x[batch.wanted], batch.wanted, batch.lora)

    def enter(self, batch: ForwardBatch, step: ForwardStep) -> Tensor:
        """What the first residual is given: [T, hidden]"""
        x = self.embed(batch.ids if batch.fed is None else batch.fed.into(batch.ids), step)
        if batch.splice is not None:
            x[batch.splice.tokens] = batch.splice.rows
        return x.float() if self.wide else x

    def reach(self, positions: int) -> None:
        """Have rotary tables for sequences of so many tokens."""
        for rotary in self.rotaries:
            rotary.reach(positions)

    def step(self, batch: ForwardBatch, pool: Pool) -> ForwardStep:
        """What the layers are told of a batch."""
        rows, slots, recurrent = batch.recurrent, pool.slots, None
        if rows is not None:
            recurrent = RecurrentStep(batch.query_start, rows.slots, rows.fresh, slots.layers)
        return ForwardStep(batch.positions, self.attention.plan(batch, pool.kv), batch.lora, recurrent, batch.long)

    def remember(self, readers: Sequence[Reader], features: Tensor, slots: Tensor, pool: Pool, lora: LinearDelta | None) -> None:
        """Have mixers keep keys and values of what they will look at, in these slots of their layers' pages."""
        none = slots.new_empty(0)
        batch = ForwardBatch(none, none, none, none, none, slots, none, None)
        step = ForwardStep(none, self.attention.plan(batch, pool.kv), lora)
        for reader in readers:
            reader.remember(features, step)
