"""Self-attention of this rank's heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvrun.attention.backend import Scores
from kvrun.nn.linear import Linear
from kvrun.nn.positions import RotaryTable
from kvrun.nn.step import ForwardStep


@dataclass(frozen=True)
class Attention:
    """out(attend(rotate(qkv(x)))), a partial sum over the ranks' heads."""

    layer: int  # of the page pool
    heads: int  # of this rank
    kv_heads: int  # of this rank
    head_dim: int
    qkv: Linear
    out: Linear
    rotary: RotaryTable | None
    scores: Scores

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        both, heads = self.heads + self.kv_heads, self.heads
        qkv = self.qkv(x, step.lora).view(-1, both + self.kv_heads, self.head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads:both], qkv[:, both:]
        if self.rotary is not None:
            self.rotary.rotate(q, k, step.positions)
        mixed = step.attention.run(self.layer, q, k, v, self.scores)
        return self.out(mixed.view(-1, heads * self.head_dim), step.lora)
