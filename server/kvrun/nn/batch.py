"""The tensors of one forward pass. Built by the engine, read by every module; never changed by either afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kvrun.nn.linear import LinearDelta


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
