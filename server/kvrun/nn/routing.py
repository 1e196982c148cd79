"""Which experts a token goes to, and how much each of them counts, by every rule that models know."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor

from kvrun.spec import GroupedSigmoid, GroupedSoftmax, PlainGroupedSigmoid, Router, SoftmaxTopK, SparseMixer, TopKSoftmax

# logits [T, experts] float32 -> choice [T, k] int64, weights [T, k] float32
Route = Callable[[Tensor], tuple[Tensor, Tensor]]


@singledispatch
def route_of(router: Router, correction: Tensor | None) -> Route:
    """The function of a described router; `correction` [experts] is what one of them adds to its scores."""
    raise TypeError(f"no routing for a {type(router).__name__}")


@route_of.register
def _(router: TopKSoftmax, correction: Tensor | None) -> Route:
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        best, choice = logits.topk(router.top, dim=-1)
        return choice, best.softmax(-1)

    return route


@route_of.register
def _(router: SoftmaxTopK, correction: Tensor | None) -> Route:
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, choice = logits.softmax(-1).topk(router.top, dim=-1)
        return choice, weights * router.scale

    return route


@route_of.register
def _(router: GroupedSoftmax, correction: Tensor | None) -> Route:
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1)
        standing = scores.unflatten(-1, (router.groups, -1)).amax(-1)
        # A share of nothing is the last to be chosen, and harmless if it is: shares are positive.
        weights, choice = _within(scores, standing, router.top_groups, 0.0).topk(router.top, dim=-1)
        return choice, weights * router.scale

    return route


@route_of.register
def _(router: GroupedSigmoid, correction: Tensor | None) -> Route:
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = sigmoid(logits)
        wanted = scores + correction
        standing = wanted.unflatten(-1, (router.groups, -1)).topk(2, dim=-1).values.sum(-1)
        choice = _within(wanted, standing, router.top_groups, float("-inf")).topk(router.top, dim=-1).indices
        weights = scores.gather(-1, choice)
        if not isinstance(router, PlainGroupedSigmoid):
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return choice, weights * router.scale

    return route


@route_of.register
def _(router: SparseMixer, correction: Tensor | None) -> Route:
    def pick(left: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        best, choice = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * router.jitter
        return choice, left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, choice)

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        first, first_weight = pick(logits, logits)
        second, second_weight = pick(logits.scatter(-1, first, float("-inf")), logits)
        return torch.cat([first, second], -1), torch.cat([first_weight, second_weight], -1)

    return route


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), as the softmax of x beside 0: torch's own rounds a tensor's last numbers otherwise than the rest."""
    return torch.stack([x, torch.zeros_like(x)], -1).softmax(-1)[..., 0]


def _within(scores: Tensor, standing: Tensor, groups: int, outside: float) -> Tensor:
    """Scores [T, experts] of the experts in the `groups` groups that stand highest [T, groups], and `outside` for the others."""
    kept = torch.zeros_like(standing, dtype=torch.bool).scatter_(-1, standing.topk(groups, dim=-1).indices, True)
    return scores.masked_fill(~kept.repeat_interleave(scores.shape[-1] // standing.shape[-1], -1), outside)
