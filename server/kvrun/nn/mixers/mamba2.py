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
from kvrun.weights.split import Span


@dataclass(frozen=True)
class GroupNorm:
    """x / rms(x) * weight for each group by itself; ranks that hold parts of one group add up their squares."""

    weight: Tensor  # [channels] of this rank
    eps: float
    groups: Span  # of this rank
    width: int  # channels of a whole group
    all_groups: int
    divided: bool  # whether some rank holds a part of a group
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, channels] -> a new [T, channels]"""
        first, end = self.groups
        wide = x.float().view(len(x), end - first, -1)
        squares = wide.square().sum(-1)
        if self.divided:
            shared = torch.zeros(len(x), self.all_groups)
            shared[:, first:end] = squares
            squares = self.group.all_reduce(shared)[:, first:end]
        scaled = wide * torch.rsqrt(squares / self.width + self.eps).unsqueeze(-1)
        return (scaled.view(x.shape) * self.weight).to(x.dtype)


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
    norm: GroupNorm
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
    split, group, tables = parts.shared.split, parts.shared.group, parts.tables
    share = split.heads(mixer.heads, mixer.groups)
    width, divided = mixer.heads // mixer.groups * mixer.head_dim, split.world > mixer.groups
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
        norm=GroupNorm(tables["norm"].float(), mixer.eps, share.kv, width, mixer.groups, divided, group),
        out=parts.linears["out"],
    )
