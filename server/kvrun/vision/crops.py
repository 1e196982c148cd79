"""The arithmetic of an image far from square that is cut into crops along its longer edge."""

from __future__ import annotations

import math

from kvrun.spec import PanAndScan
from kvrun.vision.tiles import Size


def crops(cutting: PanAndScan, image: Size) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each crop, from left to right or from top to bottom; nothing where the image is shown whole only."""
    longer, shorter = max(image), min(image)
    if longer / shorter < cutting.ratio:
        return []
    side = math.ceil(longer / min(cutting.most, max(2, min(longer // cutting.shortest, math.floor(longer / shorter + 0.5)))))
    if min(side, shorter) < cutting.shortest:
        return []
    spans = [(start, min(start + side, longer)) for start in range(0, longer, side)]
    if image.width >= image.height:
        return [(start, 0, end, image.height) for start, end in spans]
    return [(0, start, image.width, end) for start, end in spans]
