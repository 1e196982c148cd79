"""The whole way from an image's bytes to the rows that take the place of its token's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from kvrun.nn.norms import Norm
from kvrun.nn.residual import PostNorm, Residual
from kvrun.nn.vision.patches import Patches
from kvrun.nn.vision.stages import Stage
from kvrun.nn.vision.step import picture_step
from kvrun.spec import Images, PanAndScan, Tiles
from kvrun.vision.cut import pictures
from kvrun.vision.decode import decode
from kvrun.vision.largest import blank, largest
from kvrun.vision.tiles import Size, best_grid, margins


@dataclass(frozen=True)
class Sight:
    """Decode, cut, encode, project, join."""

    spec: Images
    patches: Patches
    before: Norm | None
    residuals: tuple[Residual | PostNorm, ...]
    after: Norm | None
    stages: tuple[Stage, ...]
    tables: Mapping[str, Tensor]  # what joining needs, by name
    dtype: torch.dtype

    @torch.inference_mode()
    def features(self, data: bytes) -> Tensor:
        """Rows for the embedding, one for each of the image's tokens that it replaces, [rows, hidden]. Raises ImageError."""
        image = decode(data)
        seen = [torch.from_numpy(picture).to(self.patches.weight) for picture in pictures(image, self.spec.cutting, self.spec.pixels)]
        found = [rows for _, alike in groupby(seen, key=lambda picture: picture.shape) for rows in self._encode(torch.stack(list(alike)))]
        return join(self.spec.cutting, found, Size(image.size[1], image.size[0]), self.tables)

    def largest(self) -> bytes:
        """A file of an image that takes the most memory to encode and to hold, of all that there may be."""
        return blank(largest(self.spec.cutting))

    def memory_tokens(self, page_tokens: int) -> int:
        """Tokens of memory that an image takes, in whole pages; 0 = its features stand in the embedding."""
        return -(-self.spec.memory // page_tokens) * page_tokens

    def rule(self, page_tokens: int) -> dict[str, Any]:
        """What an image becomes in a prompt, by the wire's names for it."""
        spec, memory = self.spec, self.memory_tokens(page_tokens)
        text = {"marker": spec.marker, "text": spec.text, "border": spec.border, "spaces": spec.spaces.upper()}
        return {**text, "token": spec.token, "together": spec.together, "memory": memory, **layout(spec.cutting, spec.features)}

    def _encode(self, same: Tensor) -> Tensor:
        """Pictures of one shape, [n, 3, height, width] -> [n, features, hidden]"""
        x = self.patches(same)
        step, rows = picture_step(len(x)), x.flatten(0, 1).contiguous()
        rows = rows if self.before is None else self.before(rows)
        for residual in self.residuals:
            residual(rows, step)
        rows = rows if self.after is None else self.after(rows)
        x = rows.unflatten(0, (len(x), -1))
        for stage in self.stages:
            x = stage(x)
        return x


@singledispatch
def layout(cutting: object, features: int) -> dict[str, Any]:
    """How many ids an image becomes, by the wire's names for it. features: of each picture, where all have as many."""
    return {"fixed": {"features": features}}


@layout.register
def _(cutting: Tiles, features: int) -> dict[str, Any]:
    grids = [{"height": height, "width": width} for height, width in cutting.grids]
    return {"tiled": {"tile_pixels": cutting.side, "tile_tokens": cutting.tokens, "grids": grids}}


@layout.register
def _(cutting: PanAndScan, features: int) -> dict[str, Any]:
    words = {key: getattr(cutting, key) for key in ("before_whole", "before_crops", "between_crops")}
    return {"panned": {"features": features, "shortest": cutting.shortest, "most": cutting.most, "ratio": cutting.ratio, **words}}


@singledispatch
def join(cutting: object, found: list[Tensor], image: Size, tables: Mapping[str, Tensor]) -> Tensor:
    """The features of all pictures of an image as one. found: [features, hidden] each."""
    return torch.cat(found)


@join.register
def _(cutting: Tiles, found: list[Tensor], image: Size, tables: Mapping[str, Tensor]) -> Tensor:
    whole, *tiles = found
    grid, side = best_grid(image, cutting.grids), cutting.tokens
    laid = torch.stack(tiles).unflatten(0, (-1, grid.width // cutting.side)).unflatten(2, (side, side))
    laid = laid.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [rows, columns, hidden] of features as in the image
    top, left = margins(image, Size(*laid.shape[:2]))
    kept = laid[top : laid.shape[0] - top, left : laid.shape[1] - left]
    ends = tables["newline"].expand(len(kept), 1, -1)
    return torch.cat((whole, torch.cat((kept, ends), dim=1).flatten(0, 1)))
