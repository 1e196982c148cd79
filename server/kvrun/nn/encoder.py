"""What reads a source: the decoder's embedding, residuals of its own, a norm, and nothing that is asked for logits."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.attention.backend import AttentionBackend
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.embedding import Embedding
from kvrun.nn.norms import Norm
from kvrun.nn.residual import PostNorm, Residual
from kvrun.nn.step import ForwardStep, Reader
from kvrun.state.pool import Pool


@dataclass(frozen=True)
class Encoder:
    """Embed, then every residual, then the norm; then every reader keeps what it will want of that."""

    embed: Embedding
    residuals: tuple[Residual | PostNorm, ...]
    norm: Norm
    readers: tuple[Reader, ...]
    attention: AttentionBackend

    def forward(self, batch: ForwardBatch, pool: Pool) -> None:
        """Read the batch's sources, whole ones only, and leave the readers' keys and values in their pages."""
        step = ForwardStep(batch.positions, self.attention.plan(batch, pool.kv), batch.lora)
        x = self.embed(batch.ids, step)
        for residual in self.residuals:
            residual(x, step)
        x = self.norm(x)
        for reader in self.readers:
            reader.remember(x, step)
