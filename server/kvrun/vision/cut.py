"""An image becomes the pictures that an encoder reads, as its model was trained to see it."""

from __future__ import annotations

from functools import singledispatch

import numpy as np
from PIL import Image

from kvrun.errors import ImageError
from kvrun.spec import Bounded, PanAndScan, Pixels, Quarters, Square, Tiles
from kvrun.vision.crops import crops
from kvrun.vision.tiles import Size, best_grid, fitted


def pictures(image: Image.Image, cutting: object, pixels: Pixels) -> list[np.ndarray]:
    """Pictures of an RGB image, [3, height, width] float32 each. Raises ImageError."""
    return [_numbers(picture, pixels) for picture in cut(cutting, image, pixels.filter)]


@singledispatch
def cut(cutting: object, image: Image.Image, filter: int) -> list[Image.Image]:
    """The pictures before their bytes become numbers."""
    raise TypeError(f"no way to cut an image into {type(cutting).__name__}")


@cut.register
def _(cutting: Square, image: Image.Image, filter: int) -> list[Image.Image]:
    return [image.resize((cutting.side, cutting.side), filter)]


@cut.register
def _(cutting: Bounded, image: Image.Image, filter: int) -> list[Image.Image]:
    width, height = image.size
    if width >= height > 0 and width > cutting.longest:
        width, height = cutting.longest, int(cutting.longest / (width / height))
    elif height > width and height > cutting.longest:
        width, height = int(cutting.longest * (width / height)), cutting.longest
    return [image.resize((max(width, cutting.shortest), max(height, cutting.shortest)), filter)]


@cut.register
def _(cutting: Quarters, image: Image.Image, filter: int) -> list[Image.Image]:
    (width, height), (across, down) = image.size, (image.size[0] // 2, image.size[1] // 2)
    if not across or not down:
        raise ImageError(f"an image of {width} x {height} pixels has no quarters; send one of at least 2 x 2")
    boxes = ((0, 0, across, down), (across, 0, width, down), (0, down, across, height), (across, down, width, height))
    return [picture for part in (*map(image.crop, boxes), image) for picture in cut(cutting.each, part, filter)]


@cut.register
def _(cutting: PanAndScan, image: Image.Image, filter: int) -> list[Image.Image]:
    boxes = crops(cutting, Size(image.size[1], image.size[0]))
    return [picture.resize((cutting.side, cutting.side), filter) for picture in (image, *map(image.crop, boxes))]


@cut.register
def _(cutting: Tiles, image: Image.Image, filter: int) -> list[Image.Image]:
    size = Size(image.size[1], image.size[0])
    grid, side = best_grid(size, cutting.grids), cutting.side
    inside = fitted(size, grid)
    padded = Image.new("RGB", (grid.width, grid.height))
    corner = ((grid.width - inside.width) // 2, (grid.height - inside.height) // 2)
    padded.paste(image.resize((inside.width, inside.height), filter), corner)
    corners = [(x, y) for y in range(0, grid.height, side) for x in range(0, grid.width, side)]
    return [image.resize((side, side), filter), *(padded.crop((x, y, x + side, y + side)) for x, y in corners)]


def _numbers(picture: Image.Image, pixels: Pixels) -> np.ndarray:
    # In double precision first and by division then, as the processors do that models were trained with.
    scaled = (np.asarray(picture, np.float64) * pixels.rescale).astype(np.float32)
    normal = (scaled - np.asarray(pixels.mean, np.float32)) / np.asarray(pixels.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))
