"""The images of a sequence whose tokens look at them: each image's features lie in pages of its memory, from its encoding to the end."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvrun.engine.images import Image, in_order
from kvrun.errors import ImageError, ProtocolError
from kvrun.nn.batch import MemoryRows

if TYPE_CHECKING:
    from kvrun.nn.vision.sight import Sight


class Seen(NamedTuple):
    """An image just encoded, and where its features go."""

    rows: Tensor  # [features, width]
    slots: Tensor  # [features] int32, page * page_tokens + offset


class LookedImages:
    """What the tokens of one sequence look at: each the last image before it, unless that stands in a text which has ended.

    An image takes whole pages of the memory.
    """

    def __init__(self, images: Items[Image], sight: Sight, prompt_tokens: int, pages: Items[int], page_tokens: int) -> None:
        """Raises ProtocolError when images are out of order or of the prompt, or the pages do not hold them."""
        in_order(images, prompt_tokens)
        each = sight.memory_tokens(page_tokens) // page_tokens
        if len(pages) < len(images) * each:
            raise ProtocolError(f"its {len(images)} images need {each} memory pages each, and it has {len(pages)}")
        self._sight, self._images, self._page_tokens = sight, list(images), page_tokens
        self._pages: np.ndarray = np.asarray(pages[: len(images) * each], np.int32).reshape(-1, each)
        self._places: np.ndarray | None = None  # of each image's own id among the tokens
        self._encoded: set[int] = set()

    @property
    def busy(self) -> bool:
        """Whether some image is still to be read."""
        return len(self._encoded) < len(self._images)

    @property
    def memory(self) -> int:
        """Features of each image."""
        return self._sight.spec.memory

    def look(self, start: int, stop: int, ids: np.ndarray) -> list[Seen]:
        """Encode what the tokens from `start` to `stop` are the first to look at. Raises ImageError."""
        seen = []
        for _, number in self._runs(start, stop, ids):
            if number >= 0 and number not in self._encoded:
                rows = self._sight.features(self._images[number].data)
                offsets = np.arange(len(rows))
                slots = self._pages[number][offsets // self._page_tokens] * self._page_tokens + offsets % self._page_tokens
                seen.append(Seen(rows, torch.from_numpy(slots.astype(np.int32))))
                self._encoded.add(number)
                self._images[number] = replace(self._images[number], data=b"")  # nobody asks for it again
        return seen

    def forget(self, computed: int) -> None:
        """Nothing: later tokens look at the last image still."""

    def runs(self, start: int, stop: int, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """How many tokens after each other from `start` to `stop` look at one image, and its pages; none where they look at none."""
        for count, number in self._runs(start, stop, ids):
            yield count, self._pages[number] if number >= 0 else self._pages[:0].reshape(-1)

    def _runs(self, start: int, stop: int, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        places = self._find(ids)
        ends: np.ndarray = np.flatnonzero(ids[:stop] == self._sight.spec.end_of_text)
        changes = np.union1d(places, ends + 1).tolist()
        for begin, end in pairwise([start, *(place for place in changes if start < place < stop), stop]):
            number = int(np.searchsorted(places, begin, side="right")) - 1
            hidden = number >= 0 and np.searchsorted(ends, places[number]) < np.searchsorted(ends, begin)
            yield end - begin, -1 if hidden else number

    def _find(self, ids: np.ndarray) -> np.ndarray:
        if self._places is None:
            found: list[np.ndarray] = [
                image.at + np.flatnonzero(ids[image.at : image.end] == self._sight.spec.token) for image in self._images
            ]
            if any(len(places) != 1 for places in found):
                raise ImageError(f"an image stands at one token {self._sight.spec.token}, and its place in the prompt has another number")
            self._places = np.concatenate([np.empty(0, np.int64), *found])
        return self._places


def looked_at(parts: Items[tuple[int, int, np.ndarray, LookedImages]]) -> MemoryRows:
    """Runs of tokens and the memories they look at. Each part: start and stop in its sequence, its ids, its images."""
    memory = parts[0][3].memory
    runs = [run for start, stop, ids, images in parts for run in images.runs(start, stop, ids)]
    counts = np.fromiter((count for count, _ in runs), np.int32, len(runs))
    # One that looks at nothing has a page all the same, of which it sees no token.
    contexts = np.fromiter((memory if len(pages) else 1 for _, pages in runs), np.int32, len(runs))
    last = np.fromiter((memory - 1 if len(pages) else -1 for _, pages in runs), np.int32, len(runs))
    table: np.ndarray = np.zeros((len(runs), max(1, *(len(pages) for _, pages in runs))), np.int32)
    for row, (_, pages) in enumerate(runs):
        table[row, : len(pages)] = pages
    begins: np.ndarray = np.zeros(len(runs) + 1, np.int32)
    np.cumsum(counts, out=begins[1:])
    arrays: tuple[np.ndarray, ...] = (contexts, table, np.repeat(last, counts), begins)
    return MemoryRows(*map(torch.from_numpy, arrays))
