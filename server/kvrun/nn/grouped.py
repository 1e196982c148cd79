"""Many linears of one shape, each with rows of its own, multiplied in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kvrun_kernels.ops import LoraSites
from torch import Tensor

from kvrun.nn.linear import Linear, LinearDelta
from kvrun.quant import GroupedWeights


@dataclass(frozen=True)
class Groups:
    """Rows made of tokens and ordered by group; within a group they are in their tokens' order."""

    offsets: Tensor  # [groups + 1] int64: group g owns rows offsets[g] to offsets[g + 1]
    tokens: Tensor  # [rows] int64: the token of each row


class GroupedLinear:
    """Group g's rows times the transpose of linear g's weight, plus its bias, plus what the adapters of their tokens add."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        sites = [linear.site for linear in linears]
        self._sites = LoraSites(tuple(sites), torch.tensor(sites))
        biases = [bias for linear in linears if (bias := linear.bias) is not None]
        self._weights = GroupedWeights([linear.weight for linear in linears], biases or None)

    def __call__(self, x: Tensor, groups: Groups, lora: LinearDelta | None) -> Tensor:
        """x [rows, in_features] -> [rows, out_features]"""
        y = self._weights.matmul(x, groups.offsets)
        if lora is not None:
            lora.apply_grouped(self._sites, x, y, groups.tokens, groups.offsets)
        return y


def sorted_by(choice: Tensor, count: int) -> tuple[Groups, Tensor]:
    """The rows of tokens that each chose several of `count` groups, and where the rows of each token went.

    choice [T, k] int64 -> groups of T * k rows, places [T, k] int64
    """
    flat = choice.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    offsets = order.new_zeros(count + 1)
    # Not bincount: on a GPU it waits to see how long it becomes.
    counts = order.new_zeros(count).scatter_add_(0, flat, torch.ones_like(flat))
    torch.cumsum(counts, 0, out=offsets[1:])
    return Groups(offsets, order // choice.shape[1]), places.view(choice.shape)
