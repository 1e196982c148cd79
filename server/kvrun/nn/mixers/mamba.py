"""Mamba: every channel of this rank carries a small state of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.dist import Group
from kvrun.errors import Unsupported
from kvrun.nn.linear import Linear
from kvrun.nn.parts import Parts, activation, build_mixer
from kvrun.nn.step import ForwardStep
from kvrun.spec import Mamba as SpecMamba
from kvrun.spec.recurrent import Convolution as SpecConvolution


@dataclass(frozen=True)
class Convolution:
    """silu of each channel convolved with its own taps."""

    layer: int  # of the slots
    weight: Tensor  # [channels, taps]
    bias: Tensor | None

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, channels] -> the same"""
        r = step.recurrent
        assert r is not None, "a recurrent mixer has slots"
        return ops.causal_conv(x, self.weight, self.bias, r.query_start, r.slots, r.fresh, r.layers[self.layer], "silu")


@dataclass(frozen=True)
class Mamba:
    """out(scan(conv(x)) * silu(gate)), a partial sum over the ranks' channels.

    What a token chooses of its time step, input and output depends on the channels of all ranks, so this sum cannot wait
    for the residual's.
    """

    layer: int  # of the slots
    widths: tuple[int, int, int]  # of time step, input and output, as chosen
    select_eps: float | None
    project: Linear
    conv: Convolution
    select: Linear
    step: Linear
    step_bias: Tensor  # [channels] float32
    decay: Tensor  # [channels, size] float32
    skip: Tensor  # [channels] float32
    out: Linear
    group: Group

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        r = step.recurrent
        assert r is not None, "a recurrent mixer has slots"
        x, gate = self.project(x, step.lora).chunk(2, dim=1)
        x = self.conv(x, step)
        chosen = self.group.all_reduce(self.select(x, step.lora)).split(self.widths, dim=1)
        if self.select_eps is not None:
            chosen = tuple(_unit(part, self.select_eps) for part in chosen)
        dt, into, outof = chosen
        dt = self.step(dt.contiguous(), step.lora)
        y = ops.selective_scan(
            x, dt, self.decay, into, outof, self.skip, self.step_bias, r.query_start, r.slots, r.fresh, r.layers[self.layer], gate
        )
        return self.out(y, step.lora)


def _unit(x: Tensor, eps: float) -> Tensor:
    """x / rms(x)"""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def convolution(conv: SpecConvolution, layer: int, parts: Parts) -> Convolution:
    """The module of a convolution; the kernel knows one activation. Raises Unsupported."""
    if activation(conv.act) != "silu":
        raise Unsupported(f"a recurrent layer with activation {conv.act} is not served; silu is")
    return Convolution(layer, parts.tables["taps"][:, 0].contiguous(), parts.tables.get("taps_bias"))


@build_mixer.register
def _(mixer: SpecMamba, parts: Parts) -> Mamba:
    conv, state = parts.shared.slot_layers(parts.slots)
    linears, tables = parts.linears, parts.tables
    return Mamba(
        layer=state,
        widths=(mixer.rank, mixer.size, mixer.size),
        select_eps=mixer.select_eps,
        project=linears["project"],
        conv=convolution(mixer.conv, conv, parts),
        select=linears["select"],
        step=linears["step"],
        step_bias=tables["step_bias"],
        decay=-torch.exp(tables["decay"]),
        skip=tables["skip"],
        out=linears["out"],
        group=parts.shared.group,
    )
