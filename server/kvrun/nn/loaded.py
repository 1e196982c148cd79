"""A model that is ready to run on this rank, and everything one may ask about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrun.device import Device, serving
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.captured import CapturedSteps
from kvrun.nn.decoder import Decoder
from kvrun.nn.encoder import Encoder
from kvrun.nn.linear import Linear, LinearDelta
from kvrun.nn.recorded import RecordedSteps, Recordings
from kvrun.nn.step import Reader
from kvrun.nn.vision.sight import Sight
from kvrun.spec import Config, Model
from kvrun.state.pages import KvPages, page_bytes
from kvrun.state.pool import Pool
from kvrun.state.shapes import PageShape, SlotShape
from kvrun.state.slots import Slots, slot_bytes

NARROW = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # numbers of 8 bits by the names that --activation-dtype has for them


@dataclass(frozen=True)
class LoadedModel:
    """This rank's share of a model."""

    spec: Model
    config: Config
    architecture: str
    decoder: Decoder
    encoder: Encoder | None
    sight: Sight | None  # None: it takes text only
    readers: tuple[Reader, ...]  # the mixers that look at a memory
    linears: list[Linear]  # every linear an adapter may change; linear i has site i
    page_shapes: list[PageShape]  # one per layer of the page pool
    slot_shapes: list[SlotShape]  # one per array of a recurrent state
    vocabulary: int  # width of the logits
    vocabulary_limit: int  # ids from here on pad the vocabulary and are never sampled
    positions: int  # longest sequence; 0 = no limit
    end_tokens: tuple[int, ...]
    dtype: torch.dtype
    device: Device
    quantize: str  # the weights' format, "" for plain numbers
    weight_bytes: int  # of this rank
    parameters: int  # of the whole model
    digest: str

    @property
    def activation_dtype(self) -> str:
        """What linears multiply their weights with; "int8" or "fp8" where some of it is rounded first."""
        rounded = next((linear.weight.rounded for linear in self.linears if linear.weight.rounded), None)
        return str(self.dtype).removeprefix("torch.") if rounded is None else NARROW[rounded]

    @property
    def kernels(self) -> dict[str, str]:
        """What serves each op for this model where it lies."""
        found = serving(self.device)
        # Beside it, for what is no such product: experts, and the head.
        return {**found, "quantized_linear": f"torch, {found['quantized_linear']}"} if self.activation_dtype == "fp8" else found

    @property
    def state_kinds(self) -> list[str]:
        """What a sequence keeps here, by the wire's names for it."""
        kept = {"pages": self.page_shapes, "slots": self.slot_shapes, "memory": self.encoder}
        return [kind for kind, there in kept.items() if there]

    def pool(self, pages: int, page_tokens: int = 16, dtype: torch.dtype | None = None, sequences: int = 1) -> Pool:
        """Zeroed pages, and slots for so many sequences where the model needs some; `dtype` None is the model's own."""
        return Pool(
            KvPages(self.page_shapes, pages, page_tokens, dtype or self.dtype, self.device.place, spare=int(self.device.captures)),
            Slots(self.slot_shapes, sequences if self.slot_shapes else 0, self.dtype, self.device.place),
        )

    @torch.inference_mode()
    def recorded(self, pool: Pool, sizes: Sequence[int] = ()) -> Recordings:
        """Room for the recordings of steps over a pool, or what was captured of steps of `sizes` rows where the device wants that."""
        # Whoever reads a source or keeps a state brings more along than a capture has a place for.
        if sizes and self.device.captures and not (self.slot_shapes or self.encoder or self.readers):
            return CapturedSteps(self.decoder, pool, self.positions, self.linears, self.dtype, sizes)
        return RecordedSteps(self.decoder, pool, self.positions, self.device.place)

    @property
    def long_after(self) -> int:
        """Sequences that may come to more tokens than this are computed as long ones from the first; 0 = none is."""
        return max((rotary.long_after for rotary in self.decoder.rotaries), default=0)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one sequence's recurrent state on this rank; 0 where there is none."""
        return slot_bytes(self.slot_shapes, self.dtype.itemsize)

    def page_bytes(self, page_tokens: int = 16, dtype: torch.dtype | None = None) -> int:
        """Bytes of one page over all layers of this rank."""
        return page_bytes(self.page_shapes, page_tokens, dtype or self.dtype)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, pool: Pool, recorded: Recordings | None = None) -> Tensor | None:
        """Logits of the wanted tokens, [S, vocabulary] float32, on rank 0; None elsewhere. Every rank must call it alike.

        The batch was made on the host, the logits lie where the model does. `recorded`: what steps over this pool left to
        be made again.
        """
        self.decoder.reach(int(batch.contexts.max()))
        return self.decoder.forward(self.device.take(batch), pool, recorded)

    @torch.inference_mode()
    def encode(self, batch: ForwardBatch, pool: Pool) -> None:
        """Read whole sources into the pages of their memories. Every rank must call it alike."""
        assert self.encoder is not None, "only a model with an encoder is given sources"
        self.encoder.forward(self.device.take(batch), pool)

    @torch.inference_mode()
    def remember(self, features: Tensor, slots: Tensor, pool: Pool, lora: LinearDelta | None) -> None:
        """Keep what every mixer that looks at images will want of one: features [n, width] · slots [n] int32 of its memory."""
        self.decoder.remember(self.readers, features, slots.to(features.device), pool, lora)
