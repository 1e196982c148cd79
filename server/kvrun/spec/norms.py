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
