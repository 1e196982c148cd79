"""What one part of a model remembers of a sequence, as sizes: what memory is planned and pools are made by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

# The number formats of pages by their names on a command line: bytes of a number, and of the scale of each vector of them.
STORED = {"float32": (4, 0), "bfloat16": (2, 0), "float16": (2, 0), "fp8_e4m3fn": (1, 0), "fp8_e5m2": (1, 0), "int8": (1, 4)}


@dataclass(frozen=True)
class PageShape:
    """What one layer remembers of one token on this rank: `planes` of `kv_heads` vectors, a key's and a value's as a rule."""

    kv_heads: int
    head_dim: int
    planes: int = 2

    @property
    def elements(self) -> int:
        """Numbers per token."""
        return self.planes * self.kv_heads * self.head_dim

    def bytes(self, stored: str) -> int:
        """Bytes per token in a format of STORED."""
        number, scale = STORED[stored]
        return self.planes * self.kv_heads * (self.head_dim * number + scale)


class PageUse(Enum):
    """Whose keys and values a layer of the page pool holds."""

    SEQUENCE = "sequence"  # those of a sequence's own tokens
    MEMORY = "memory"  # those of what an encoder made of its source, which lie in pages of their own
    READING = "reading"  # those of a source while an encoder reads it; nothing later needs them


class PageLayers:
    """The layers of a page pool, as the mixers of a model ask for them.

    A page holds tokens of a sequence or tokens of its memory, never both, so one layer serves a mixer of each use where
    their shapes agree.
    """

    def __init__(self) -> None:
        self.shapes: list[PageShape] = []
        self._taken: set[tuple[int, PageUse]] = set()

    def take(self, shape: PageShape, use: PageUse = PageUse.SEQUENCE) -> int:
        """The number of a layer for one more mixer; a reader's layer is written anew by every mixer that reads."""
        for layer, other in enumerate(self.shapes):
            if other == shape and (use is PageUse.READING or (layer, use) not in self._taken):
                break
        else:
            layer = len(self.shapes)
            self.shapes.append(shape)
        self._taken.add((layer, use))
        return layer


@dataclass(frozen=True)
class SlotShape:
    """An array that one layer keeps of a whole sequence on this rank, of one size however long the sequence is."""

    sizes: tuple[int, ...]
    wide: bool = False  # float32 whatever the model computes in: a sum over the whole sequence

    def bytes(self, item_bytes: int) -> int:
        """Bytes for one sequence in a model whose numbers take `item_bytes`."""
        return math.prod(self.sizes) * (4 if self.wide else item_bytes)
