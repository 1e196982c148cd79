"""What a sequence reads before it writes: the source of a model with an encoder, and the pages of its memory."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from kvrun.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Source:
    """The ids that the encoder reads once, and the pages in which the decoder finds what it made of them."""

    ids: np.ndarray  # int64
    pages: np.ndarray  # int32, the sequence's own until its release

    @classmethod
    def of(cls, ids: Items[int], pages: Items[int], vocabulary: int, all_pages: int, page_tokens: int) -> Source:
        """Raises ProtocolError when an id or a page does not exist, or the pages do not hold the ids."""
        if not len(ids):
            raise ProtocolError("it has no source, and this model answers to one")
        if max(ids) >= vocabulary:
            raise ProtocolError(f"token id {max(ids)} of its source is not below the vocabulary of {vocabulary}")
        if len(ids) > len(pages) * page_tokens:
            raise ProtocolError(f"its source has {len(ids)} tokens, but its {len(pages)} memory pages hold {page_tokens} each")
        if max(pages) >= all_pages:
            raise ProtocolError(f"memory page {max(pages)} is not below the {all_pages} reserved")
        return cls(np.asarray(ids, np.int64), np.asarray(pages, np.int32))
