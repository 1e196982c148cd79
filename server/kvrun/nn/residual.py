"""x <- x + what its mixers add, and the stack's only all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun_kernels import ops
from torch import Tensor

from kvrun.dist import Group
from kvrun.nn.norms import Norm
from kvrun.nn.step import ForwardStep, Mixer


@dataclass(frozen=True)
class Branch:
    """A norm and the mixers that read what it gives."""

    norm: Norm | None
    mixers: tuple[Mixer, ...]


@dataclass(frozen=True)
class Residual:
    """Branches that all read the same x. Every mixer gives a partial sum, so one all-reduce serves them all."""

    branches: tuple[Branch, ...]
    group: Group
    after: Norm | None = None
    scale: float = 1.0

    def __call__(self, x: Tensor, step: ForwardStep) -> None:
        """Add to x in place. x [T, hidden]"""
        total: Tensor | None = None
        for branch in self.branches:
            h = x if branch.norm is None else branch.norm(x)
            for mixer in branch.mixers:
                part = mixer(h, step)
                if total is None:
                    total = part
                else:
                    ops.add_(total, part)
        if total is None:
            return
        total = self.group.all_reduce(total)
        if self.after is not None:
            total = self.after(total)
        ops.add_(x, total, self.scale)


@dataclass(frozen=True)
class PostNorm:
    """A residual without norms of its own, and a norm of what x became."""

    residual: Residual
    norm: Norm

    def __call__(self, x: Tensor, step: ForwardStep) -> None:
        """Change x in place. x [T, hidden]"""
        self.residual(x, step)
        x.copy_(self.norm(x))
