"""Mixtures of experts: how a token's experts are chosen, and how checkpoints store many matrices of one shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvrun.spec.mixers import GatedMlp, Mixer
from kvrun.spec.weights import Fused


@dataclass(frozen=True)
class TopKSoftmax:
    """The `top` largest logits, weighed by the softmax among them: that of all, its largest made to sum to 1."""

    top: int


@dataclass(frozen=True)
class SoftmaxTopK:
    """The `top` largest of the softmax of all logits, weighed by `scale` times what they are."""

    top: int
    scale: float = 1.0


@dataclass(frozen=True)
class GroupedSoftmax:
    """As SoftmaxTopK, among the experts of the `top_groups` groups with the largest shares (DeepSeek V2)."""

    top: int
    groups: int
    top_groups: int
    scale: float = 1.0


@dataclass(frozen=True)
class GroupedSigmoid:
    """Chosen by sigmoid(logit) + correction, among the groups whose two best sum highest; weighed without it (DeepSeek V3).

    The weights are made to sum to `scale`.
    """

    top: int
    groups: int
    top_groups: int
    scale: float
    correction: str  # a number per expert


@dataclass(frozen=True)
class PlainGroupedSigmoid(GroupedSigmoid):
    """The same, but each weight is `scale` times its own sigmoid."""


@dataclass(frozen=True)
class SparseMixer:
    """Two experts, one after the other, each weighed within those logits that come near the largest left (arXiv 2409.12136).

    Near: (largest - logit) / max(|logit|, largest) is at most twice `jitter`.
    """

    jitter: float


Router = TopKSoftmax | SoftmaxTopK | GroupedSoftmax | GroupedSigmoid | SparseMixer


@dataclass(frozen=True)
class EachExpert:
    """Every expert's matrices are modules of their own; {e} in a name is the expert's number."""

    gate: str
    up: str
    down: str
    together: str | None = None  # the module that holds all of them for adapters that change all at once


@dataclass(frozen=True)
class FlatExperts:
    """Three tensors [experts * width, hidden]: the experts below each other, down stored as its transpose."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class StackedExperts:
    """Two tensors for all experts, [experts, 2 * width, hidden] and [experts, hidden, width].

    Order "halves": all rows of gate, then all of up; "alternating": one of gate, one of up. A bias's name is its tensor's
    with "_bias" behind it.
    """

    gate_up: str
    down: str
    order: Literal["halves", "alternating"] = "halves"
    bias: bool = False
    transposed: bool = False  # the last two dimensions the other way round
    together: str | None = None  # see EachExpert; None = adapters know the tensors by these names


ExpertLayout = EachExpert | FlatExperts | StackedExperts


@dataclass(frozen=True)
class ClampedSwiGlu:
    """(up + 1) * gate * sigmoid(alpha * gate), gate cut to at most `limit` and up to -limit .. limit"""

    limit: float
    alpha: float


@dataclass(frozen=True)
class Moe(Mixer):
    """The sum of what a token's experts make of x, each a gated feed-forward weighed by the router."""

    experts: int
    width: int  # of each expert
    act: str | ClampedSwiGlu
    router: Router
    logits: Fused  # from `hidden` to one per expert
    layout: ExpertLayout
    logits_alias: str | None = None  # another name under which adapters know the logits' matrix


@dataclass(frozen=True)
class Gated(Mixer):
    """sigmoid(gate(x)) * part(x), with one gate for all numbers of a token"""

    gate: Fused
    part: GatedMlp
