"""Models that read a source once and then write: the encoder, and how the decoder looks at what it made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrun.spec.mixers import Attention, Mixer
from kvrun.spec.norms import Norm
from kvrun.spec.weights import Fused, Stored

if TYPE_CHECKING:
    from kvrun.spec.model import Layer


@dataclass(frozen=True)
class Encoder:
    """norm(layers(embed(source))): it looks ids up in the decoder's embedding."""

    layers: tuple[Layer, ...]
    norm: Norm


@dataclass(frozen=True)
class SourceAttention(Attention):
    """Self-attention in which every token of a source sees the whole source."""


@dataclass(frozen=True)
class CrossAttention(Mixer):
    """Attention of an answer's tokens to the encoder's output, whose keys and values are made once."""

    heads: int
    kv_heads: int
    head_dim: int
    query: Fused
    key_value: Stored  # parts: key, value
    out: Fused
    scale: float | None = None  # of the scores; None = head_dim ** -0.5
