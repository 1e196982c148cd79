"""A model that is ready to run on this rank, and everything one may ask about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvrun.nn.batch import ForwardBatch
from kvrun.nn.decoder import Decoder
from kvrun.nn.linear import Linear
from kvrun.spec import Config, Model
from kvrun.state.pages import KvPages, page_bytes
from kvrun.state.shapes import PageShape


@dataclass(frozen=True)
class LoadedModel:
    """This rank's share of a model."""

    spec: Model
    config: Config
    architecture: str
    decoder: Decoder
    linears: list[Linear]  # every linear an adapter may change; linear i has site i
    page_shapes: list[PageShape]  # one per layer that keeps keys and values
    vocabulary: int  # width of the logits
    vocabulary_limit: int  # ids from here on pad the vocabulary and are never sampled
    positions: int  # longest sequence; 0 = no limit
    end_tokens: tuple[int, ...]
    dtype: torch.dtype
    device: str
    weight_bytes: int  # of this rank
    parameters: int  # of the whole model
    digest: str

    def pool(self, pages: int, page_tokens: int = 16, dtype: torch.dtype | None = None) -> KvPages:
        """A zeroed page pool for this model; `dtype` None is the model's own."""
        return KvPages(self.page_shapes, pages, page_tokens, dtype or self.dtype, self.device)

    def page_bytes(self, page_tokens: int = 16, dtype: torch.dtype | None = None) -> int:
        """Bytes of one page over all layers of this rank."""
        return page_bytes(self.page_shapes, page_tokens, (dtype or self.dtype).itemsize)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KvPages) -> Tensor | None:
        """Logits of the wanted tokens, [S, vocabulary] float32, on rank 0; None elsewhere. Every rank must call it alike."""
        return self.decoder.forward(batch, kv)
