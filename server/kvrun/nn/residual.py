"""x <- x + what its mixers add, and the stack's only all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvrun.dist import Group
from kvrun.nn.norms import Norm
from kvrun.nn.step import ForwardStep, Mixer


@dataclass(frozen=True)
class Branch:
    """A norm and the mixers that read what it gives."""

    norm: Norm
    mixers: tuple[Mixer, ...]


@dataclass(frozen=True)
class Residual:
    """Branches that all read the same x. Every mixer gives a partial sum, so one all-reduce serves them all."""

    branches: tuple[Branch, ...]
    group: Group

    def __call__(self, x: Tensor, step: ForwardStep) -> None:
        """Add to x in place. x [T, hidden]"""
        total: Tensor | None = None
        for branch in self.branches:
            h = branch.norm(x)
            for mixer in branch.mixers:
                part = mixer(h, step)
                total = part if total is None else total.add_(part)
        if total is not None:
            x += self.group.all_reduce(total)
