"""Ways to tell a model where a token stands, and ways to stretch them beyond what it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with a sequence once it is longer than the model's own positions; up to there, no change."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, a smooth band between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """Interpolated below a number of rotations, kept above another, and cosines and sines scaled by `attention_factor`."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """Two sets of divisors, one per frequency, and two factors of cosines and sines: for sequences that stay within
    `original_positions`, and from their first token on for those that may grow longer.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_positions: int
    short_attention: float
    long_attention: float


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """Rotates the first `dim` values of each query and key by the token's position.

    Style "half" turns the pairs (i, i + dim / 2), "interleaved" the pairs (2i, 2i + 1).
    """

    dim: int
    theta: float
    scaling: RopeScaling | None = None
    style: Literal["half", "interleaved"] = "half"


@dataclass(frozen=True)
class Alibi:
    """Adds to each attention score the head's slope times key position minus query position, times `scale`."""

    scale: float = 1.0


@dataclass(frozen=True)
class RelativeBias:
    """Adds to each attention score a number learned for the head and the bucket of the key's distance before the query.

    `buckets` rows of `heads`: half of them for one distance each, the others for ever wider ranges up to `distance`.
    """

    name: str  # in full, as layers share it
    buckets: int
    distance: int


@dataclass(frozen=True)
class TwoSidedBias(RelativeBias):
    """The same with the upper half of the buckets for keys behind the query."""


@dataclass(frozen=True)
class Learned:
    """A table with one row per position, added to the embedding; position p reads row p + offset."""

    name: str
    rows: int
    offset: int = 0
