"""What a residual adds: attention and feed-forward parts. Each says its sizes and where its weights lie."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.spec.norms import QueryKeyNorm
from kvrun.spec.positions import Alibi, RelativeBias, Rope
from kvrun.spec.weights import Fused, Stored


class Mixer:
    """A part that a residual adds; every kind of part derives from it."""


@dataclass(frozen=True)
class Attention(Mixer):
    """Causal self-attention; `heads // kv_heads` query heads read each key/value head."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv: Stored  # parts: query, key, value
    out: Fused
    position: Rope | Alibi | RelativeBias | None = None  # None: the embedding knows, or nobody does
    scale: float | None = None  # of the scores; None = head_dim ** -0.5
    window: int | None = None  # a token sees itself and the window - 1 before it; None = all
    clip: float | None = None  # queries, keys and values are cut to -clip .. clip, after any norm; None = never
    norm: QueryKeyNorm | None = None  # of queries and keys, before they are rotated
    softcap: float | None = None  # scores become cap * tanh(score / cap); None = as they are
    sinks: str | None = None  # a logit per head that takes its share of the softmax and gives nothing


@dataclass(frozen=True)
class GatedMlp(Mixer):
    """down(act(gate(x)) * up(x))"""

    width: int
    act: str
    gate_up: Stored  # parts: gate, up
    down: Fused


@dataclass(frozen=True)
class Mlp(Mixer):
    """down(act(up(x)))"""

    width: int
    act: str
    up: Fused
    down: Fused
