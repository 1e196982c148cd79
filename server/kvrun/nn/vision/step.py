"""What the parts of a picture encoder share while pictures of one shape pass through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from kvrun.attention.backend import AttentionStep, Scores
from kvrun.nn.step import ForwardStep


@dataclass(frozen=True)
class Together:
    """Attention in which all rows of a picture see each other, for several pictures with as many rows each."""

    pictures: int

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """q [rows, heads, dim] · k, v [rows, kv_heads, dim] · out like q"""
        return attend(q, k, v, self.pictures, scores.scale)


@dataclass(frozen=True)
class PictureStep(ForwardStep):
    """A step without pages, positions or adapters."""

    pictures: int = 1
    features: Tensor | None = None  # [pictures * patches, width]: what latents look at


def picture_step(pictures: int, features: Tensor | None = None) -> PictureStep:
    """The step of so many pictures of one shape."""
    # Of what attention over pages can do, the mixers of an encoder only run it.
    attention = cast(AttentionStep, Together(pictures))
    return PictureStep(torch.empty(0, dtype=torch.int32), attention, None, pictures=pictures, features=features)


def attend(q: Tensor, k: Tensor, v: Tensor, pictures: int, scale: float) -> Tensor:
    """Softmax attention of each picture's queries to all its keys.

    q [pictures * n, heads, dim] · k, v [pictures * m, kv_heads, dim] · out like q
    """
    heads = q.shape[1] // k.shape[1]
    split = [x.unflatten(0, (pictures, -1)).transpose(1, 2) for x in (q, k, v)]
    keys, values = (x.repeat_interleave(heads, dim=1) for x in split[1:])
    mixed = functional.scaled_dot_product_attention(split[0], keys, values, scale=scale)
    return mixed.transpose(1, 2).flatten(0, 1).contiguous()
