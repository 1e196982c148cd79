"""The two ends of a decoder that are as wide as the vocabulary, split by its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from kvrun.dist import Group
from kvrun.nn.norms import Norm
from kvrun.quant.format import QuantizedLinear
from kvrun.weights.split import Span


@dataclass(frozen=True)
class Embedding:
    """The embeddings of the ids in `held`, and the learned positions if the model has them."""

    rows: Callable[[Tensor], Tensor]  # indices within `held` [T] -> a new [T, hidden]
    held: Span
    group: Group
    positions: Tensor | None = None  # [rows, hidden], whole on every rank
    offset: int = 0

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids [T] int64 · positions [T] int32 -> [T, hidden]"""
        x = self.rows(ids) if self.group.world == 1 else self._share(ids)
        if self.positions is not None:
            x += functional.embedding(positions + self.offset, self.positions)
        return x

    def _share(self, ids: Tensor) -> Tensor:
        first, end = self.held
        elsewhere = (ids < first) | (ids >= end)
        x = self.rows((ids - first).masked_fill(elsewhere, 0))
        x[elsewhere] = 0
        return self.group.all_reduce(x)


@dataclass(frozen=True)
class Head:
    """Logits of the wanted tokens, gathered to rank 0."""

    norm: Norm
    weight: QuantizedLinear  # [rows of this rank, hidden]
    bias: Tensor | None
    sizes: Sequence[int]  # rows of every rank
    group: Group

    def __call__(self, x: Tensor) -> Tensor | None:
        """x [S, hidden] -> [S, vocabulary] float32 on rank 0, None elsewhere"""
        logits = self.group.gather_columns(self.weight.matmul(self.norm(x), self.bias), self.sizes)
        return None if logits is None else logits.float()
