"""Normalisations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) * (weight + offset)"""

    name: str
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * weight + bias"""

    name: str
    eps: float
    weight: bool = True
    bias: bool = True


Norm = RmsNorm | LayerNorm


@dataclass(frozen=True)
class Gate:
    """tanh(weight) * x, with one weight for all numbers of x or one for each"""

    name: str  # of the weight itself
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HeadNorm:
    """Each query head and each key head normalised by itself, all of them with the same vectors."""

    query: Norm
    key: Norm


@dataclass(frozen=True)
class EachHeadNorm:
    """Each query head and each key head normalised by itself, with a vector of its own: weights [heads, head_dim].

    A name that holds {head} is that of one tensor [head_dim] for each head.
    """

    query: Norm
    key: Norm


@dataclass(frozen=True)
class ProjectionNorm:
    """All query heads of a token normalised as one vector, and all its key heads as another."""

    query: RmsNorm
    key: RmsNorm


QueryKeyNorm = HeadNorm | EachHeadNorm | ProjectionNorm
