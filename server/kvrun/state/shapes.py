"""What one part of a model remembers of a sequence, as sizes: what memory is planned and pools are made by."""

from __future__ import annotations

from dataclasses import dataclass


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
