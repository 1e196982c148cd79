"""The image that takes the most to encode of all that a model may be shown."""

from __future__ import annotations

import math
from functools import singledispatch
from io import BytesIO

from PIL import Image

from kvrun.spec import Bounded, PanAndScan, Quarters, Square, Tiles
from kvrun.vision.tiles import Size, count


def blank(size: Size) -> bytes:
    """A file of nothing, of this size."""
    data = BytesIO()
    Image.new("RGB", (size.width, size.height)).save(data, "PNG")
    return data.getvalue()


@singledispatch
def largest(cutting: object) -> Size:
    """The size of an image that becomes the most pictures, of the most pixels and features."""
    raise TypeError(f"no largest image to cut into {type(cutting).__name__}")


@largest.register
def _(cutting: Square) -> Size:
    return Size(cutting.side, cutting.side)


@largest.register
def _(cutting: Bounded) -> Size:
    return Size(cutting.longest, cutting.longest)


@largest.register
def _(cutting: Quarters) -> Size:
    each = largest(cutting.each)
    return Size(2 * each.height, 2 * each.width)


@largest.register
def _(cutting: PanAndScan) -> Size:
    return Size(cutting.shortest, cutting.shortest * max(cutting.most, math.ceil(cutting.ratio)))


@largest.register
def _(cutting: Tiles) -> Size:
    def worth(grid: Size) -> tuple[int, int]:
        return grid.height * grid.width, count(grid, cutting.side, cutting.tokens, cutting.grids)

    return max((Size(*grid) for grid in cutting.grids), key=worth)
