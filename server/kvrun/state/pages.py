"""The paged key/value pool of this rank. Who owns which page is the router's business; nothing here remembers it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvrun_kernels import large
from torch import Tensor

from kvrun.state.shapes import STORED, PageShape

_TYPES = {name: getattr(torch, name.replace("fp8", "float8")) for name in STORED}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class KvPages:
    """Keys and values of every layer: `layers[i]` is [pages, planes, kv_heads, page_tokens, head_dim], key 0 and value 1.

    In int8 the last dimension is longer by the bytes of a vector's scale; `kvrun_kernels.stored` reads and writes them.
    """

    def __init__(
        self,
        shapes: Sequence[PageShape],
        pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        spare: int = 0,
    ) -> None:
        """spare: pages after these that nobody is granted"""
        self.pages = pages
        self.page_tokens = page_tokens
        self.place = torch.device(device)
        beside = STORED[stored_name(dtype)][1] // dtype.itemsize
        # Zeros, not garbage: a kernel may read past a short context and multiply by zero, and 0 * nan is nan.
        self.layers: list[Tensor] = [
            _zeros((pages + spare, s.planes, s.kv_heads, page_tokens, s.head_dim + beside), dtype, device) for s in shapes
        ]

    @property
    def tokens(self) -> int:
        """Tokens that all sequences together may keep."""
        return self.pages * self.page_tokens

    @property
    def bytes(self) -> int:
        """Bytes of the whole pool."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    # Writing the zeros would take longer than loading the model; memory is taken when a page is first written.
    return large.zeros(shape, dtype)


def page_bytes(shapes: Sequence[PageShape], page_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return sum(shape.bytes(stored_name(dtype)) for shape in shapes) * page_tokens


def stored_name(dtype: torch.dtype) -> str:
    """What a command line calls the format of a pool of this dtype."""
    return _NAMES[dtype]


def stored_type(name: str) -> torch.dtype:
    """The dtype of a pool in the format of that name."""
    return _TYPES[name]
