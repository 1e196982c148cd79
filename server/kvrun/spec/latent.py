"""Attention whose keys and values are made of one short latent vector per token (DeepSeek's multi-head latent attention)."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.spec.mixers import Mixer
from kvrun.spec.norms import RmsNorm
from kvrun.spec.positions import Rope
from kvrun.spec.weights import Fused


@dataclass(frozen=True)
class LowRank:
    """up(norm(down(x))), `rank` numbers in between"""

    rank: int
    down: Fused
    norm: RmsNorm
    up: Fused


@dataclass(frozen=True)
class LatentAttention(Mixer):
    """Causal self-attention over (norm(latent), rotated key) = down(x), one such pair for all heads of a token.

    Each head makes its own keys and values of the latent: `up` has, head by head, `plain_dim` rows of key and `value_dim`
    rows of value. A query has `plain_dim` numbers for the former and `rotated_dim` for the rotated key.
    """

    heads: int
    plain_dim: int
    rotated_dim: int
    value_dim: int
    latent_dim: int
    query: Fused | LowRank
    down: Fused
    norm: RmsNorm
    up: Fused
    out: Fused
    position: Rope
    scale: float  # of the scores
