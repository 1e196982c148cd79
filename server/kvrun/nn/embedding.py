"""The two ends of a decoder that are as wide as the vocabulary, split by its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvrun.dist import Group
from kvrun.nn.linear import Linear, LinearDelta
from kvrun.nn.norms import Norm
from kvrun.nn.step import ForwardStep
from kvrun.weights.split import Span


@dataclass(frozen=True)
class Embedding:
    """norm(project(table[id] * scale) + position): this rank looks up the ids in `held`, the ranks share what they found."""

    module: str  # of the checkpoint
    vocabulary: int  # rows of the whole table
    width: int  # of the table
    rows: Callable[[Tensor], Tensor]  # indices within `held` [T] -> a new [T, width]
    held: Span
    group: Group
    scale: float = 1.0
    project: Linear | None = None
    positions: Tensor | None = None  # [rows, hidden], whole on every rank
    offset: int = 0
    norm: Norm | None = None

    def __call__(self, ids: Tensor, step: ForwardStep) -> Tensor:
        """ids [T] int64 -> [T, hidden]"""
        x = self.rows(ids) if self.group.world == 1 else self._share(ids)
        if step.lora is not None:
            step.lora.embed(ids, x)
        if self.scale != 1.0:
            x *= torch.tensor(self.scale, dtype=x.dtype)  # rounded first, as the models were trained
        if self.project is not None:
            x = self.project(x, step.lora)
        if self.positions is not None:
            x += functional.embedding(step.positions + self.offset, self.positions)
        return x if self.norm is None else self.norm(x)

    def _share(self, ids: Tensor) -> Tensor:
        first, end = self.held
        elsewhere = (ids < first) | (ids >= end)
        x = self.rows((ids - first).masked_fill(elsewhere, 0))
        x[elsewhere] = 0
        return self.group.all_reduce(x)


@dataclass(frozen=True)
class Head:
    """Logits of the wanted tokens, gathered to rank 0."""

    weight: Linear  # to this rank's rows of the vocabulary
    sizes: Sequence[int]  # rows of every rank
    group: Group
    norm: Norm | None = None
    project: Linear | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor, tokens: Tensor, lora: LinearDelta | None) -> Tensor | None:
        """x [S, hidden] of these tokens of the step, [S] int64 ascending -> [S, vocabulary] float32 on rank 0, None elsewhere"""
        x = x if self.norm is None else self.norm(x)
        if self.project is not None:
            x = self.project.of_some(x, tokens, lora)
        gathered = self.group.gather_columns(self.weight.of_some(x, tokens, lora), self.sizes)
        if gathered is None:
            return None
        logits = gathered.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
