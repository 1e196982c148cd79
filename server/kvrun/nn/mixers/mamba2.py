"""Mamba 2: every head of this rank carries a state, and groups of heads share what goes in and comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.dist import Group
from kvrun.nn.linear import Linear
from kvrun.nn.mixers.mamba import Convolution, convolution
from kvrun.nn.parts import Parts, build_mixer
from kvrun.nn.step import ForwardStep
from kvrun.spec import Mamba2 as SpecMamba2


@dataclass(frozen=True)
class GroupNorm:
    """x / rms(x) * weight for each group by itself, all of them on this rank."""

    weight: Tensor  # [channels] of this rank
    width: int  # channels of a group
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, channels] -> a new [T, channels]"""
        scaled = ops.rms_norm(x.view(-1, self.width), x.new_ones(self.width), self.eps)
        return scaled.view(x.shape) * self.weight


@dataclass(frozen=True)
class DividedGroupNorm:
    """The same for a part of one group, whose other parts are on other ranks: they add up their squares."""

    weight: Tensor  # [channels] of this rank
    width: int  # channels of the whole group
    eps: float
    number: int  # of the group
    groups: int  # of all ranks
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, channels] -> a new [T, channels]"""
        wide = x.float()
        squares = wide.new_zeros(len(x), self.groups)
        # A running sum adds in one order; torch's plain sum adds in another for another number of rows.
        squares[:, self.number] = wide.square().cumsum(dim=1)[:, -1]
        total = self.group.all_reduce(squares)[:, self.number : self.number + 1]
        return (wide * torch.rsqrt(total / self.width + self.eps)).to(x.dtype) * self.weight


@dataclass(frozen=True)
class Mamba2:
    """out(norm(scan(conv(x)) * silu(gate))), a partial sum over the ranks' heads."""

    layer: int  # of the slots
    heads: int  # of this rank
    head_dim: int
    groups: int  # of this rank
    size: int
    project: Linear
    conv: Convolution
    step_bias: Tensor  # [heads] float32
    decay: Tensor  # [heads] float32
    skip: Tensor  # [heads] float32
    least: float
    most: float
    norm: GroupNorm | DividedGroupNorm
    out: Linear

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        r = step.recurrent
        assert r is not None, "a recurrent mixer has slots"
        tokens, inner, chosen = len(x), self.heads * self.head_dim, self.groups * self.size
        gate, mixed, dt = self.project(x, step.lora).split((inner, inner + 2 * chosen, self.heads), dim=1)
        x, into, outof = self.conv(mixed, step).split((inner, chosen, chosen), dim=1)
        y = ops.ssd_scan(
            x.view(tokens, self.heads, self.head_dim), dt, self.decay,
            into.view(tokens, self.groups, self.size), outof.view(tokens, self.groups, self.size), self.skip, self.step_bias,
            r.query_start, r.slots, r.fresh, r.layers[self.layer], gate.view(tokens, self.heads, self.head_dim),
            least=self.least, most=self.most,
        )  # fmt: skip
        return self.out(self.norm(y.view(tokens, inner)), step.lora)


@build_mixer.register
def _(mixer: SpecMamba2, parts: Parts) -> Mamba2:
    conv, state = parts.shared.slot_layers(parts.slots)
    split, tables = parts.shared.split, parts.tables
    share = split.heads(mixer.heads, mixer.groups)
    norm: GroupNorm | DividedGroupNorm = GroupNorm(tables["norm"], mixer.heads // mixer.groups * mixer.head_dim, mixer.eps)
    if split.world > mixer.groups:
        norm = DividedGroupNorm(norm.weight, norm.width, norm.eps, share.kv[0], mixer.groups, parts.shared.group)
    return Mamba2(
        layer=state,
        heads=share.heads,
        head_dim=mixer.head_dim,
        groups=share.kv_heads,
        size=mixer.size,
        project=parts.linears["project"],
        conv=convolution(mixer.conv, conv, parts),
        step_bias=tables["step_bias"],
        decay=-torch.exp(tables["decay"]),
        skip=tables["skip"],
        least=mixer.least,
        most=mixer.most,
        norm=norm,
        out=parts.linears["out"],
    )
