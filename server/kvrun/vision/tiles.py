"""The arithmetic of an image laid over a grid of tiles: which grid, what of it is image, and how many features that leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Size(NamedTuple):
    """Height and width, of pixels or of features."""

    height: int
    width: int


def best_grid(image: Size, grids: Iterable[tuple[int, int]]) -> Size:
    """The grid that keeps most of the image's pixels, the one that wastes least of several such, the first of several of those."""

    def worth(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid
        scale = min(width / image.width, height / image.height)
        kept = min(int(image.width * scale) * int(image.height * scale), image.height * image.width)
        return kept, kept - height * width

    return Size(*max(grids, key=worth))


def fitted(image: Size, grid: Size) -> Size:
    """The image's size when it is as large as the grid allows without changing its shape."""
    across, down = grid.width / image.width, grid.height / image.height
    if across < down:
        return Size(min(math.ceil(image.height * across), grid.height), grid.width)
    return Size(grid.height, min(math.ceil(image.width * down), grid.width))


def margins(image: Size, features: Size) -> Size:
    """How many rows of features at top and bottom each, and how many columns at the left and right, are padding only."""
    # Rounded as the models were trained: the quotients are compared as floats and cut after seven digits.
    if image.width / image.height > features.width / features.height:
        height = int(round(image.height * (features.width / image.width), 7))
        return Size((features.height - height) // 2, 0)
    width = int(round(image.width * (features.height / image.height), 7))
    return Size(0, (features.width - width) // 2)


def count(image: Size, side: int, tokens: int, grids: Iterable[tuple[int, int]]) -> int:
    """How many tokens the image becomes: one picture of it, then the rows of its tiles with one more at the end of each."""
    grid = best_grid(image, grids)
    features = Size(grid.height // side * tokens, grid.width // side * tokens)
    top, left = margins(image, features)
    return tokens * tokens + (features.height - 2 * top) * (features.width - 2 * left + 1)
