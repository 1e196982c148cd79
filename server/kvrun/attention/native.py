"""Attention by the ops of `kvrun_kernels`, which read pages directly and need no preparation."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun_kernels import ops
from torch import Tensor

from kvrun.attention.backend import Ragged, Scores
from kvrun.state.pages import KvPages


@dataclass(frozen=True)
class NativeStep:
    """A step's batch and the pool it runs over."""

    batch: Ragged
    kv: KvPages

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """See AttentionStep."""
        b, pool = self.batch, self.kv.layers[layer]
        ops.store_kv(k, v, pool, b.slots)
        return ops.paged_attention(
            q, pool, b.query_start, b.contexts, b.page_table, scores.scale, scores.window, scores.softcap, scores.slopes
        )


class Native:
    """The backend of every device whose ops are in `kvrun_kernels`."""

    def plan(self, batch: Ragged, kv: KvPages) -> NativeStep:
        """See AttentionBackend."""
        return NativeStep(batch, kv)
