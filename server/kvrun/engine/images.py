"""The images of a sequence: where they stand among its tokens, and their features for as long as some are not computed."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvrun.errors import ImageError, ProtocolError
from kvrun.nn.batch import Splice

if TYPE_CHECKING:
    from kvrun.nn.vision.sight import Sight


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it came, and the ids that it became."""

    data: bytes
    at: int  # index of the first id
    tokens: int

    @property
    def end(self) -> int:
        """One past the index of the last id."""
        return self.at + self.tokens


def in_order(images: Items[Image], prompt_tokens: int) -> None:
    """Raises ProtocolError when images are out of order or of the prompt."""
    ends = [0, *(image.end for image in images)]
    if any(image.at < end or not image.tokens for image, end in zip(images, ends, strict=False)) or ends[-1] > prompt_tokens:
        raise ProtocolError(f"its images must follow each other within the {prompt_tokens} tokens of its prompt")


class Shown(NamedTuple):
    """Where a chunk of a sequence shows features of an image."""

    places: np.ndarray  # indices into the sequence's tokens
    rows: Tensor  # [places, hidden]
    ends: np.ndarray  # for each place, that of its picture's last feature


class SequenceImages:
    """What one sequence shows. An image is encoded with the first row that computes some of its ids."""

    def __init__(self, images: Items[Image], sight: Sight | None, prompt_tokens: int) -> None:
        """Raises ProtocolError when images are out of order or of the prompt, or the model takes none."""
        if images and sight is None:
            raise ProtocolError("it has images, and this model takes none")
        in_order(images, prompt_tokens)
        self._sight = sight
        self._left = list(images)  # of which some id is not computed
        self._features: dict[int, tuple[np.ndarray, Tensor]] = {}  # by the index of an image's first id

    @property
    def together(self) -> bool:
        """Whether an image's features see each other in both directions."""
        return self._sight is not None and self._sight.spec.together

    @property
    def busy(self) -> bool:
        """Whether some image may still be to be read."""
        return bool(self._left)

    def look(self, start: int, stop: int, ids: np.ndarray) -> Items[tuple[Tensor, Tensor]]:
        """Encode what the tokens from `start` to `stop` show first; nothing of it goes to pages.

        Raises ImageError, and ProtocolError where they cut a whole.
        """
        for image in self._left:
            if image.end <= start or image.at >= stop or self._sight is None:
                continue
            if self.together and not start <= image.at < image.end <= stop:
                raise ProtocolError(f"tokens {start} to {stop} cut an image at {image.at} to {image.end}, whose tokens see each other")
            if image.at not in self._features:
                self._features[image.at] = self._encode(image, ids)
        return ()

    def shown(self, start: int, stop: int) -> list[Shown]:
        """The features that tokens from `start` to `stop` show; `look` has encoded them."""
        found = []
        for places, rows in self._features.values():
            first, last = (int(np.searchsorted(places, edge)) for edge in (start, stop))
            if first < last:
                found.append(Shown(places[first:last], rows[first:last], _ends(places)[first:last]))
        return found

    def forget(self, computed: int) -> None:
        """Let go of every image whose ids all lie before `computed`."""
        for image in self._left:
            if image.end <= computed:
                self._features.pop(image.at, None)
        self._left = [image for image in self._left if image.end > computed]

    def _encode(self, image: Image, ids: np.ndarray) -> tuple[np.ndarray, Tensor]:
        assert self._sight is not None
        rows = self._sight.features(image.data)
        places: np.ndarray = image.at + np.flatnonzero(ids[image.at : image.end] == self._sight.spec.token)
        if len(places) != len(rows):
            raise ImageError(f"the image makes {len(rows)} features, its place in the prompt was counted as {len(places)}")
        return places, rows


def _ends(places: np.ndarray) -> np.ndarray:
    """Of each place, the last that it reaches without a gap: the features of a picture stand beside each other, those of two do not."""
    last = np.flatnonzero(np.diff(places, append=places[-1] + 2) > 1)
    return places[np.repeat(last, np.diff(last, prepend=-1))]


class Chunk(NamedTuple):
    """A row of a step whose sequence has images."""

    first: int  # index of its first token in the step
    start: int  # in its sequence
    stop: int
    images: SequenceImages


def splice(chunks: Items[Chunk], positions: np.ndarray) -> tuple[Splice | None, Tensor | None]:
    """What stands in place of the embedding's rows, and the last position that each token sees where that is not its own.

    positions [T] int32, of every token of the step
    """
    shown = [(chunk, part) for chunk in chunks for part in chunk.images.shown(chunk.start, chunk.stop)]
    if not shown:
        return None, None
    tokens: list[np.ndarray] = [part.places - chunk.start + chunk.first for chunk, part in shown]
    reach = None
    for (chunk, part), at in zip(shown, tokens, strict=True):
        if chunk.images.together:
            reach = positions.copy() if reach is None else reach
            reach[at] = part.ends
    rows = torch.cat([part.rows for _, part in shown])
    return Splice(torch.from_numpy(np.concatenate(tokens)), rows), None if reach is None else torch.from_numpy(reach)
