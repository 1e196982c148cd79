"""What an attention backend must offer: prepare once per step, then attend layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvrun.state.pages import KvPages
from kvrun.state.shapes import PageUse


@dataclass(frozen=True)
class HostRows:
    """Rows of a batch as the host knows them, by the names of Ragged: planning reads them without waiting for the device."""

    query_start: np.ndarray
    contexts: np.ndarray
    page_table: np.ndarray


class Ragged(Protocol):
    """The part of a forward batch that says which tokens belong together and where their pages are."""

    @property
    def query_start(self) -> Tensor:
        """[N + 1] int32: row n owns tokens query_start[n] to query_start[n + 1]"""

    @property
    def contexts(self) -> Tensor:
        """[N] int32: tokens of each row's sequence that lie in pages after this step"""

    @property
    def page_table(self) -> Tensor:
        """[N, M] int32: the pages of each row's sequence"""

    @property
    def slots(self) -> Tensor:
        """[T] int32: where each token's key and value go"""

    @property
    def reach(self) -> Tensor | None:
        """[T] int32: the last position that each token sees; None = its own"""

    @property
    def memory(self) -> Memory | None:
        """What cross-attention reads; None in a model without"""

    @property
    def host(self) -> HostRows | None:
        """The same rows on the host; None = they are known where they lie only"""


class Memory(Protocol):
    """Where the memory of each row's sequence lies."""

    @property
    def contexts(self) -> Tensor:
        """[N] int32: tokens of each memory"""

    @property
    def page_table(self) -> Tensor:
        """[N, M] int32: its pages"""

    @property
    def reach(self) -> Tensor:
        """[T] int32: the last token of its memory that each token sees"""

    @property
    def query_start(self) -> Tensor | None:
        """[N + 1] int32: the tokens that see memory n, where that is not row n's; None = row n's"""


@dataclass(frozen=True)
class Scores:
    """How one layer scores a key for a query."""

    scale: float
    window: int = 0  # 0 = all keys
    slopes: Tensor | None = None  # [heads] float32: added per position of distance
    softcap: float = 0.0  # scores become cap * tanh(score / cap); 0 = as they are
    sinks: Tensor | None = None  # [heads] float32: logits that take their share and give nothing
    value_dim: int | None = None  # a key's first numbers are its value; None = values are stored beside keys
    relative: Tensor | None = None  # [heads, 2 * R + 1] float32: added by key minus query position, kept within -R..R


@dataclass(frozen=True)
class Kind:
    """A kind of layer: what serves it is decided once, from this."""

    heads: int  # of this rank
    kv_heads: int  # of this rank
    head_dim: int
    scores: Scores
    use: PageUse = PageUse.SEQUENCE

    def __str__(self) -> str:
        s = self.scores
        said = {
            "window": s.window,
            "soft cap": s.softcap,
            "slopes": s.slopes is not None,
            "sinks": s.sinks is not None,
            "relative": s.relative is not None,
            "latent": s.value_dim,
            self.use.value: self.use is not PageUse.SEQUENCE,
        }
        more = [name if value is True else f"{name} {value:g}" for name, value in said.items() if value]
        return ", ".join([f"{self.heads} heads over {self.kv_heads} of {self.head_dim}", *more])


class AttentionStep(Protocol):
    """A prepared step."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores) -> Tensor:
        """Store k and v in their slots, then attend each query to its sequence's pages up to itself.

        q [T, heads, dim] · k, v [T, kv_heads, dim], v None where scores give a value_dim · out [T, heads, dim or value_dim]
        """

    def store(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """Store k and v in their slots. k, v [T, kv_heads, dim]"""

    def recall(self, layer: int, q: Tensor, scores: Scores) -> Tensor:
        """Attend each query to its sequence's memory. q [T, heads, dim] · out [T, heads, dim]"""

    def renew(self, batch: Ragged) -> None:
        """Prepare a step that `fixed` made for the rows of a batch that its own holds by now. Rows beyond them are nobody's."""


class AttentionBackend(Protocol):
    """One way to compute attention over pages."""

    def plan(self, batch: Ragged, kv: KvPages) -> AttentionStep:
        """Prepare what all layers of a step share. A plan is good until the next one is made."""

    def fixed(self, batch: Ragged, kv: KvPages) -> AttentionStep:
        """The same for a step of single tokens that is captured: what its tensors hold is new in each replay, and `renew` comes before.

        What `run` does there is the same each time, and asks the host nothing.
        """

    def serving(self, stored: torch.dtype) -> dict[str, str]:
        """What serves each kind of layer over a pool of this dtype, where that is not one op for all."""
