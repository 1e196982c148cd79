"""Attention by the ops of `kvrun_kernels`, which read pages directly and need no preparation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.attention.backend import Ragged, Scores
from kvrun.state.pages import KvPages


@dataclass(frozen=True)
class NativeStep:
    """A step's batch and the pool it runs over."""

    batch: Ragged
    kv: KvPages

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores) -> Tensor:
        """See AttentionStep."""
        self.store(layer, k, v)
        b, pool, s = self.batch, self.kv.layers[layer], scores
        return ops.paged_attention(
            q, pool, b.query_start, b.contexts, b.page_table, s.scale, s.window, s.softcap, s.slopes,
            sinks=s.sinks, reach=b.reach, relative=s.relative, value_dim=s.value_dim,
        )  # fmt: skip

    def store(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """See AttentionStep."""
        ops.store_kv(k, v, self.kv.layers[layer], self.batch.slots)

    def recall(self, layer: int, q: Tensor, scores: Scores) -> Tensor:
        """See AttentionStep."""
        memory = self.batch.memory
        assert memory is not None, "a model that reads a source has memory for every row"
        pool = self.kv.layers[layer]
        start = self.batch.query_start if memory.query_start is None else memory.query_start
        return ops.paged_attention(q, pool, start, memory.contexts, memory.page_table, scores.scale, reach=memory.reach)

    def renew(self, batch: Ragged) -> None:
        """Nothing: the ops read the rows where they lie."""


class Native:
    """The backend of every device whose ops are in `kvrun_kernels`."""

    def plan(self, batch: Ragged, kv: KvPages) -> NativeStep:
        """See AttentionBackend."""
        return NativeStep(batch, kv)

    def fixed(self, batch: Ragged, kv: KvPages) -> NativeStep:
        """See AttentionBackend."""
        return NativeStep(batch, kv)

    def serving(self, stored: torch.dtype) -> dict[str, str]:
        """Nothing beside the ops that `device.serving` names."""
        return {}
