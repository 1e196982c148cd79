"""The paged key/value pool of this rank. Who owns which page is the router's business; nothing here remembers it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrun.state.shapes import PageShape


class KvPages:
    """Keys and values of every layer: `layers[i]` is [pages, planes, kv_heads, page_tokens, head_dim], key 0 and value 1."""

    def __init__(
        self, shapes: Sequence[PageShape], pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        # Zeros, not garbage: a kernel may read past a short context and multiply by zero, and 0 * nan is nan.
        self.layers: list[Tensor] = [
            torch.zeros(pages, s.planes, s.kv_heads, page_tokens, s.head_dim, dtype=dtype, device=device) for s in shapes
        ]

    @property
    def bytes(self) -> int:
        """Bytes of the whole pool."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


def page_bytes(shapes: Sequence[PageShape], page_tokens: int, element_bytes: int) -> int:
    """Bytes of one page over all layers."""
    return sum(shape.elements for shape in shapes) * page_tokens * element_bytes
