"""Mixtures of experts: rows are ordered by expert once, and two grouped products make them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvrun_kernels import ops
from torch import Tensor

from kvrun.nn.grouped import GroupedLinear, sorted_by
from kvrun.nn.linear import Linear
from kvrun.nn.parts import Parts, activation, build_mixer
from kvrun.nn.routing import Route, route_of, sigmoid
from kvrun.nn.step import ForwardStep, Mixer
from kvrun.spec import ClampedSwiGlu, StackedExperts
from kvrun.spec import moe as spec

QUICK = 1.702  # quick_gelu(x) = x * sigmoid(1.702 * x)


@dataclass(frozen=True)
class Moe:
    """The sum of what each token's experts make of it, weighed by the router: a partial sum over the ranks' inner units."""

    experts: int
    logits: Linear
    route: Route
    gate_up: GroupedLinear
    act: Callable[[Tensor], Tensor]
    down: GroupedLinear

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        # In float32, since a choice that rounding flips is another model.
        choice, weights = self.route(self.logits(x.float(), step.lora))
        groups, places = sorted_by(choice, self.experts)
        inner = self.act(self.gate_up(x[groups.tokens], groups, step.lora))
        made = self.down(inner, groups, step.lora)
        return (made[places] * weights.unsqueeze(-1)).sum(1).to(x.dtype)


@dataclass(frozen=True)
class Gated:
    """sigmoid(gate(x)) * part(x)"""

    gate: Linear
    part: Mixer

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self.part(x, step).mul_(sigmoid(self.gate(x, step.lora)))


@build_mixer.register
def _(mixer: spec.Moe, parts: Parts) -> Moe:
    numbers = range(mixer.experts)
    alternating = isinstance(mixer.layout, StackedExperts) and mixer.layout.order == "alternating"
    return Moe(
        mixer.experts,
        parts.linears["logits"],
        route_of(mixer.router, parts.tables.get("correction")),
        GroupedLinear([parts.linears[f"gate_up.{number}"] for number in numbers]),
        _act(mixer.act, alternating),
        GroupedLinear([parts.linears[f"down.{number}"] for number in numbers]),
    )


@build_mixer.register
def _(mixer: spec.Gated, parts: Parts) -> Gated:
    return Gated(parts.linears["gate"], build_mixer(mixer.part, parts))


def _act(act: str | ClampedSwiGlu, alternating: bool) -> Callable[[Tensor], Tensor]:
    """The activation over gate and up side by side, or in alternate columns: [rows, 2 * width] -> [rows, width]."""
    if isinstance(act, str) and not alternating:
        name = activation(act)
        return lambda both: ops.act_mul(both, name)

    def apart(both: Tensor) -> Tensor:
        gate, up = both.unflatten(-1, (-1, 2)).unbind(-1) if alternating else both.chunk(2, -1)
        if isinstance(act, str):
            return ops.activation(gate.contiguous(), activation(act)) * up
        # gate * sigmoid(alpha * gate), of which the kernels know the one with alpha 1.702.
        stretched = act.alpha / QUICK
        gate = ops.activation(gate.float().clamp(max=act.limit).mul_(stretched), "quick_gelu").div_(stretched)
        return (up.float().clamp(-act.limit, act.limit).add_(1) * gate).to(both.dtype)

    return apart
