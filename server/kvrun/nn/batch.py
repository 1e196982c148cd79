"""The tensors of one forward pass. Built by the engine, read by every module; never changed by either afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvrun.attention.backend import HostRows

if TYPE_CHECKING:
    from kvrun.nn.linear import LinearDelta


@dataclass(frozen=True)
class MemoryRows:
    """Where the memory of each row's sequence lies, in pages of its own."""

    contexts: Tensor  # [N] int32, tokens of each memory
    page_table: Tensor  # [N, M] int32
    reach: Tensor  # [T] int32, the last token of its memory that each token sees
    query_start: Tensor | None = None  # [N + 1] int32, where it is not rows but runs of tokens within them that see one memory


@dataclass(frozen=True)
class SlotRows:
    """Where the recurrent state of each row's sequence lies."""

    slots: Tensor  # [N] int32, no two the same
    fresh: Tensor  # [N] bool, whether the sequence begins here


@dataclass(frozen=True)
class Splice:
    """Rows that take the place of the embedding's at some tokens."""

    tokens: Tensor  # [K] int64, indices into T
    rows: Tensor  # [K, hidden]


@dataclass(frozen=True)
class Fed:
    """Ids that a step before sampled and the host does not know yet, and whose tokens of this step they are."""

    tokens: Tensor  # [K] int64, indices into T
    rows: Tensor  # [K] int64, indices into `sampled`
    sampled: Tensor  # [S] int64, where the model lies; below 0 where nothing could be sampled

    def into(self, ids: Tensor) -> Tensor:
        """The ids of all tokens, [T], with these in their places. What could not be sampled is 0: its row has failed already."""
        return ids.index_copy(0, self.tokens, self.sampled[self.rows].clamp(min=0))


@dataclass(frozen=True)
class ForwardBatch:
    """One step's tokens, laid end to end: row n is tokens `query_start[n]` to `query_start[n + 1]`.

    Prompt chunks and decoding sequences differ only in how many tokens their row has.
    """

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32, position of each token in its own sequence
    query_start: Tensor  # [N + 1] int32
    contexts: Tensor  # [N] int32, tokens that lie in pages after this step
    page_table: Tensor  # [N, M] int32, pages of each row in order; entries past the context are not read
    slots: Tensor  # [T] int32, page * page_tokens + offset: where each token's key and value go
    wanted: Tensor  # [S] int64, indices into T of the tokens whose logits are wanted
    lora: LinearDelta | None  # adapters of this step's rows; None when every row runs the base model
    long: Tensor | None = None  # [T] bool, tokens of sequences that were admitted as long; None = of none
    reach: Tensor | None = None  # [T] int32, the last position that each token sees; None = its own
    memory: MemoryRows | None = None  # of a model that reads a source
    recurrent: SlotRows | None = None  # of a model that carries a state along
    splice: Splice | None = None  # of tokens that stand for images
    fed: Fed | None = None  # of tokens whose id the device alone knows; `ids` has a 0 there
    host: HostRows | None = None  # query_start, contexts and page_table where they were made; None = nobody kept them
