"""Rotary tables and alibi slopes, computed from a description of them."""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.spec import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, RelativeBias, Rope, TwoSidedBias, YarnScaling
from kvrun.spec.positions import RopeScaling

FIRST_ROWS = 4096
Rotation = tuple[Tensor, float]  # radians per position of each pair [dim / 2] float32, a factor of cosines and sines


class RotaryTable:
    """Cosines and sines by position, shared by all layers that rotate alike. Grows to the longest sequence seen."""

    def __init__(self, rope: Rope) -> None:
        self._style = rope.style
        self._rotations = rotations(rope)
        self.rows = 0  # of each table; that of long sequences lies below that of short ones
        self._cos = self._sin = torch.empty(0)
        self.reach(FIRST_ROWS)
        # Sequences that may come to more tokens than this are long; 0 = none is.
        self.long_after = rope.scaling.original_positions if isinstance(rope.scaling, LongRopeScaling) else 0

    def reach(self, positions: int) -> None:
        """Have rows for at least this many positions."""
        if positions <= self.rows:
            return
        self.rows = 1 << (positions - 1).bit_length()
        steps = torch.arange(self.rows, dtype=torch.float32, device=self._rotations[0][0].device)[:, None]
        angles = [(steps * frequencies, scale) for frequencies, scale in self._rotations]
        self._cos = torch.cat([angle.cos() * scale for angle, scale in angles])
        self._sin = torch.cat([angle.sin() * scale for angle, scale in angles])

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, long: Tensor | None = None) -> None:
        """Rotate queries and keys in place, as in long sequences where `long` says so.

        q [T, heads, dim] · k [T, kv_heads, dim] · positions [T] int32 · long [T] bool, None = nowhere
        """
        if long is not None and self.long_after:
            positions = torch.where(long, positions + self.rows, positions)
        ops.rope_(q, k, positions, self._cos, self._sin, style=self._style)


def rotations(rope: Rope) -> list[Rotation]:
    """How pairs turn: in one way, or in two where long sequences have a way of their own, short ones first."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    plain = 1.0 / rope.theta**exponents
    scaling = rope.scaling
    if isinstance(scaling, LongRopeScaling):
        short, long = torch.tensor(scaling.short_factor), torch.tensor(scaling.long_factor)
        return [(plain / short, scaling.short_attention), (plain / long, scaling.long_attention)]
    return [(plain, 1.0) if scaling is None else _scaled(scaling, plain, rope)]


@singledispatch
def _scaled(scaling: RopeScaling, plain: Tensor, rope: Rope) -> Rotation:
    raise TypeError(f"no frequencies for a {type(scaling).__name__}")


@_scaled.register
def _(scaling: LinearScaling, plain: Tensor, rope: Rope) -> Rotation:
    return plain / scaling.factor, 1.0


@_scaled.register
def _(scaling: DynamicScaling, plain: Tensor, rope: Rope) -> Rotation:
    # The base changes only beyond the model's own positions, and no longer sequence is ever admitted.
    return plain, 1.0


@_scaled.register
def _(scaling: Llama3Scaling, plain: Tensor, rope: Rope) -> Rotation:
    rotations = scaling.original_positions * plain / (2 * math.pi)
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(plain / scaling.factor, plain, kept.clamp(0, 1)), 1.0


@_scaled.register
def _(scaling: YarnScaling, plain: Tensor, rope: Rope) -> Rotation:
    def pair_of(rotations: float) -> float:
        """The pair that makes this many rotations over the original positions."""
        return rope.dim * math.log(scaling.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 1e-3
    stretched = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return torch.lerp(plain, plain / scaling.factor, stretched), scaling.attention_factor


def alibi_slopes(heads: int) -> Tensor:
    """The slope of every head, [heads] float32: powers of 2^(-8/n) for the largest power of two n, then those between."""
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * (i + 1) / power for i in range(power)] + [4 * (2 * i + 1) / power for i in range(heads - power)]
    return torch.tensor([2.0**-e for e in exponents])


def relative_bias(bias: RelativeBias, learned: Tensor) -> Tensor:
    """What each key's distance adds to a score: key minus query position d at column d + `distance`.

    learned [buckets, heads] -> [heads, 2 * distance + 1] float32; beyond that distance nothing changes any more
    """
    ahead = torch.arange(-bias.distance, bias.distance + 1)
    if isinstance(bias, TwoSidedBias):
        half = bias.buckets // 2
        buckets = _bucket(ahead.abs(), half, bias.distance) + half * (ahead > 0)
    else:
        buckets = _bucket((-ahead).clamp(min=0), bias.buckets, bias.distance)
    return learned.float()[buckets].T.contiguous()


def _bucket(apart: Tensor, buckets: int, most: int) -> Tensor:
    """The first half of the buckets for one distance each, the second for ranges that grow with the distance's logarithm."""
    exact = buckets // 2
    wide = torch.log(apart.float() / exact) / math.log(most / exact) * (buckets - exact)
    return torch.where(apart < exact, apart, (exact + wide.clamp(min=0).long()).clamp(max=buckets - 1))
