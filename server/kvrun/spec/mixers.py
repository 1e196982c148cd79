"""What a residual adds: attention and feed-forward parts. Each says its sizes and where its weights lie."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.spec.positions import Alibi, Rope
from kvrun.spec.weights import Fused, Stored


@dataclass(frozen=True)
class Attention:
    """Causal self-attention; `heads // kv_heads` query heads read each key/value head."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv: Stored  # parts: query, key, value
    out: Fused
    position: Rope | Alibi | None = None  # None: the embedding knows, or nobody does
    scale: float | None = None  # of the scores; None = head_dim ** -0.5
    window: int | None = None  # a token sees itself and the window - 1 before it; None = all


@dataclass(frozen=True)
class GatedMlp:
    """down(act(gate(x)) * up(x))"""

    width: int
    act: str
    gate_up: Stored  # parts: gate, up
    down: Fused


@dataclass(frozen=True)
class Mlp:
    """down(act(up(x)))"""

    width: int
    act: str
    up: Fused
    down: Fused


Mixer = Attention | GatedMlp | Mlp
