"""What adapters must know of the parts they change. The words are those of `nn/`, which has the parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Alias(Protocol):
    """A parameter that holds a source's matrix among others: see weights.plan.Alias."""

    @property
    def parameter(self) -> str: ...
    @property
    def out_features(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def first(self) -> int: ...


class Source(Protocol):
    """A checkpoint module's share in a linear: see nn.linear.Source."""

    @property
    def module(self) -> str: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def column(self) -> int: ...
    @property
    def cols(self) -> Tensor | None: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def also(self) -> str: ...
    @property
    def alias(self) -> Alias | None: ...
    @property
    def flipped(self) -> bool: ...


class Weight(Protocol):
    """What a linear multiplies with: see quant.format.QuantizedLinear."""

    def dense(self) -> Tensor: ...


class Site(Protocol):
    """A linear that adapters may change: see nn.linear.Linear."""

    @property
    def site(self) -> int: ...
    @property
    def sources(self) -> Sequence[Source]: ...
    @property
    def weight(self) -> Weight: ...
    @property
    def bias(self) -> Tensor | None: ...


class EmbeddingSite(Protocol):
    """The embedding, which adapters may change too: see nn.embedding.Embedding."""

    @property
    def module(self) -> str: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def held(self) -> tuple[int, int]: ...
    @property
    def rows(self) -> Callable[[Tensor], Tensor]: ...
