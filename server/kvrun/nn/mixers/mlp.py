"""Feed-forward parts. Both return this rank's partial sum."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun_kernels import ops
from torch import Tensor

from kvrun.nn.linear import Linear
from kvrun.nn.parts import Parts, activation, build_mixer
from kvrun.nn.step import ForwardStep
from kvrun.spec import mixers as spec


@dataclass(frozen=True)
class GatedMlp:
    """down(act(gate(x)) * up(x))"""

    gate_up: Linear
    down: Linear
    act: str

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self.down(ops.act_mul(self.gate_up(x, step.lora), self.act), step.lora)


@dataclass(frozen=True)
class Mlp:
    """down(act(up(x)))"""

    up: Linear
    down: Linear
    act: str

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self.down(ops.activation(self.up(x, step.lora), self.act), step.lora)


@build_mixer.register
def _(mixer: spec.GatedMlp, parts: Parts) -> GatedMlp:
    return GatedMlp(parts.linears["gate_up"], parts.linears["down"], activation(mixer.act))


@build_mixer.register
def _(mixer: spec.Mlp, parts: Parts) -> Mlp:
    return Mlp(parts.linears["up"], parts.linears["down"], activation(mixer.act))
