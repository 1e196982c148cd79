"""Normalisations of queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrun.dist import Group
from kvrun.nn.norms import Norm, norm_of
from kvrun.nn.parts import Parts
from kvrun.spec import Attention, HeadNorm, ProjectionNorm, QueryKeyNorm
from kvrun.spec import norms as spec
from kvrun.weights.split import HeadShare, Span

# q [T, heads, dim], k [T, kv_heads, dim] -> the same, new tensors
HeadsNorm = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PerHead:
    """Each head by itself, all with one vector, or scaled afterwards by a vector of its own."""

    query: Norm
    key: Norm
    query_scale: Tensor | None = None  # [heads, dim]
    key_scale: Tensor | None = None  # [kv_heads, dim]

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See HeadsNorm."""
        return self.queries(q), self.keys(k)

    def queries(self, q: Tensor) -> Tensor:
        """q [T, heads, dim] -> the same, a new tensor"""
        return _each(q, self.query, self.query_scale)

    def keys(self, k: Tensor) -> Tensor:
        """k [T, kv_heads, dim] -> the same, a new tensor"""
        return _each(k, self.key, self.key_scale)


def _each(x: Tensor, norm: Norm, scale: Tensor | None) -> Tensor:
    y = norm(x)
    return y if scale is None else y * scale


@dataclass(frozen=True)
class Projection:
    """All heads of a token as one vector, whose squares are summed over the ranks that share them."""

    query: Tensor  # [heads, dim] of this rank
    key: Tensor  # [kv_heads, dim] of this rank
    query_width: int  # of all ranks
    key_width: int  # of all ranks
    counts_keys: bool  # whether this rank's keys are its own, or copies that another rank counts
    query_eps: float
    key_eps: float
    group: Group

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See HeadsNorm."""
        wide_q, wide_k = q.float(), k.float()
        squares = torch.stack([_sum(wide_q.square()), _sum(wide_k.square()) * self.counts_keys], dim=1)
        squares = self.group.all_reduce(squares)
        q_scale = torch.rsqrt(squares[:, 0] / self.query_width + self.query_eps)
        k_scale = torch.rsqrt(squares[:, 1] / self.key_width + self.key_eps)
        return (wide_q * q_scale[:, None, None] * self.query).to(q.dtype), (wide_k * k_scale[:, None, None] * self.key).to(k.dtype)


def _sum(x: Tensor) -> Tensor:
    """The sum of each row of x, added in one order: torch's plain sum takes another for another number of rows."""
    return x.flatten(1).cumsum(dim=1)[:, -1]


def heads_norm(mixer: Attention, norm: QueryKeyNorm, share: HeadShare, parts: Parts) -> HeadsNorm:
    """The normalisation of an attention's queries and keys on this rank."""
    if isinstance(norm, HeadNorm):
        return per_head(norm, parts.tables)
    sides = vectors_of(parts.tables, "query"), vectors_of(parts.tables, "key")
    if isinstance(norm, ProjectionNorm):
        dim, group = mixer.head_dim, mixer.heads // mixer.kv_heads
        return Projection(
            sides[0]["weight"].float().view(-1, dim) + norm.query.offset,
            sides[1]["weight"].float().view(-1, dim) + norm.key.offset,
            mixer.heads * dim,
            mixer.kv_heads * dim,
            share.query[0] == share.kv[0] * group,
            norm.query.eps,
            norm.key.eps,
            parts.shared.group,
        )
    query, key = (norm_of(_bare(side), {}) for side in (norm.query, norm.key))
    return PerHead(query, key, _each_head(sides[0], share.query), _each_head(sides[1], share.kv))


def per_head(norm: HeadNorm, tables: Mapping[str, Tensor]) -> PerHead:
    """The normalisation of every head with the same vectors, from tables named "query.weight" and so on."""
    return PerHead(norm_of(norm.query, vectors_of(tables, "query")), norm_of(norm.key, vectors_of(tables, "key")))


def _each_head(vectors: Mapping[str, Tensor], held: Span) -> Tensor:
    """A vector for each of this rank's heads, [heads, dim], stored as one tensor or as one for each head of the model."""
    return vectors["weight"] if "weight" in vectors else torch.stack([vectors[f"weight.{head}"] for head in range(*held)])


def _bare(norm: spec.Norm) -> spec.Norm:
    """The same norm without vectors of its own."""
    if not isinstance(norm, spec.LayerNorm) or norm.bias:
        raise TypeError("a vector per head is known for layer norms without bias only")
    return spec.LayerNorm(norm.name, norm.eps, weight=False, bias=False)


def vectors_of(tables: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    """The tables whose names begin with `side` and a dot, by the rest of their names."""
    return {name.removeprefix(f"{side}."): table for name, table in tables.items() if name.startswith(f"{side}.")}
