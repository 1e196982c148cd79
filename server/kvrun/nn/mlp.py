"""Feed-forward parts. Both return this rank's partial sum."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun_kernels import ops
from torch import Tensor

from kvrun.nn.linear import Linear
from kvrun.nn.step import ForwardStep


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
