"""What lies between an encoder's features and the decoder's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvrun.nn.heads import HeadsNorm
from kvrun.nn.linear import Linear
from kvrun.nn.norms import Norm
from kvrun.nn.residual import PostNorm, Residual
from kvrun.nn.step import ForwardStep, Mixer
from kvrun.nn.vision.step import PictureStep, attend, picture_step

Stage = Callable[[Tensor], Tensor]  # [pictures, features, width] -> [pictures, features, width], either of other sizes


def without_first(x: Tensor) -> Tensor:
    """See Stage."""
    return x[:, 1:]


@dataclass(frozen=True)
class Pool:
    """Averages of squares of a square of features."""

    side: int

    def __call__(self, x: Tensor) -> Tensor:
        """See Stage."""
        grid = x.transpose(1, 2).unflatten(2, (int(x.shape[1] ** 0.5), -1))
        return functional.avg_pool2d(grid, grid.shape[-1] // self.side).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Rowwise:
    """The same change of every feature by itself: a norm, a matrix or a feed-forward part."""

    change: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """See Stage."""
        return self.change(x.flatten(0, 1).contiguous()).unflatten(0, (len(x), -1))


def feed(part: Mixer) -> Rowwise:
    """A feed-forward part as a stage."""
    return Rowwise(lambda x: part(x, picture_step(1)))


@dataclass(frozen=True)
class Perceive:
    """out(attend(query(latents), key_value(norm(features) and latents)))"""

    heads: int
    kv_heads: int
    head_dim: int
    norm: Norm
    query: Linear
    key_value: Linear
    out: Linear
    each: HeadsNorm | None = None

    def __call__(self, x: Tensor, step: ForwardStep) -> Tensor:
        """x [pictures * latents, width] -> the same"""
        assert isinstance(step, PictureStep) and step.features is not None, "latents look at features"
        both = _joined(self.norm(step.features), x, step.pictures)
        k, v = self.key_value(both).unflatten(1, (2, self.kv_heads, self.head_dim)).unbind(1)
        q = self.query(x).unflatten(1, (self.heads, self.head_dim))
        if self.each is not None:
            q, k = self.each(q, k)
        return self.out(attend(q, k, v, step.pictures, self.head_dim**-0.5).flatten(1))


def _joined(features: Tensor, latents: Tensor, pictures: int) -> Tensor:
    """Each picture's features and after them its latents."""
    return torch.cat([x.unflatten(0, (pictures, -1)) for x in (features, latents)], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Resample:
    """Latents that have looked at a picture's features, in their place."""

    latents: Tensor  # [count, width]
    residuals: tuple[Residual | PostNorm, ...]
    norm: Norm

    def __call__(self, x: Tensor) -> Tensor:
        """See Stage."""
        step = picture_step(len(x), x.flatten(0, 1).contiguous())
        latents = self.latents.repeat(len(x), 1)
        for residual in self.residuals:
            residual(latents, step)
        return self.norm(latents).unflatten(0, (len(x), -1))
