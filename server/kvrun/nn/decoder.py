"""The forward path, the only one: every model is an embedding, a list of residuals and a head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvrun.attention.backend import AttentionBackend
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.embedding import Embedding, Head
from kvrun.nn.positions import RotaryTable
from kvrun.nn.residual import PostNorm, Residual
from kvrun.nn.step import ForwardStep
from kvrun.state.pages import KvPages


@dataclass(frozen=True)
class Decoder:
    """Embed, then every residual, then the head."""

    embed: Embedding
    residuals: tuple[Residual | PostNorm, ...]
    head: Head
    attention: AttentionBackend
    rotaries: tuple[RotaryTable, ...]

    def forward(self, batch: ForwardBatch, kv: KvPages) -> Tensor | None:
        """Compute the batch's tokens, leave their keys and values in `kv`.

        Returns the wanted logits [S, vocabulary] float32 on rank 0, None elsewhere.
        """
        for rotary in self.rotaries:
            rotary.reach(int(batch.contexts.max()))
        step = ForwardStep(batch.positions, self.attention.plan(batch, kv), batch.lora)
        x = self.embed(batch.ids, step)
        for residual in self.residuals:
            residual(x, step)
        return self.head(x[batch.wanted], step)
