"""Mixers that carry a state of fixed size along a sequence instead of looking back at it."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.spec.mixers import Mixer
from kvrun.spec.weights import Fused, Packed


@dataclass(frozen=True)
class Convolution:
    """Every channel convolved by itself with a filter that ends at the token, then activated."""

    name: str
    taps: int
    act: str
    bias: bool = True


@dataclass(frozen=True)
class Mamba(Mixer):
    """out(scan(conv(x)) * silu(gate)): every channel has a state of `size` numbers (Gu and Dao, arXiv 2312.00752).

    Time step, input and output of the scan are chosen by the token itself: (step, in, out) = select(conv(x)).
    """

    channels: int
    size: int
    rank: int  # of the time step before `step` widens it to all channels
    project: Packed  # parts: x, gate
    conv: Convolution
    select: Fused
    step: Fused  # its bias is added within the scan
    decay: str  # log of how fast each number of the state fades
    skip: str  # the share of its input that each channel passes on
    out: Fused
    select_eps: float | None = None  # of an RMS norm without weights over step, in and out, each by itself; None = no norm


@dataclass(frozen=True)
class Mamba2(Mixer):
    """out(norm(scan(conv(x)) * silu(gate))): every head fades as one (Dao and Gu, arXiv 2405.21060).

    `heads // groups` neighbouring heads share what they take in and give out; each group is normalised by itself.
    """

    heads: int
    head_dim: int
    groups: int
    size: int
    project: Packed  # parts: gate, x, in, out, step
    conv: Convolution  # over x, in and out
    step_bias: str
    decay: str
    skip: str
    norm: str
    eps: float
    out: Fused
    least: float  # the time step is kept within least..most
    most: float
