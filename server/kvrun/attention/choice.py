"""Which backend computes a model's attention: what was asked for, as far as the device and what is installed allow it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch

from kvrun.attention import flashinfer
from kvrun.attention.backend import AttentionBackend, Kind
from kvrun.attention.native import Native
from kvrun.errors import DeviceError

log = logging.getLogger("kvrun.attention")

# Makes the backend of a model from the kinds of its layers and the dtype that it computes in.
Maker = Callable[[Sequence[Kind], torch.dtype], AttentionBackend]


def choose_attention(asked: str, place: torch.device, capability: tuple[int, int] | None) -> Maker:
    """What makes the backend. asked: "auto", "flashinfer" or "native" · capability: of the GPU at `place`, None on a CPU.

    "auto" takes FlashInfer where it can serve. Raises DeviceError where "flashinfer" cannot.
    """
    why = "" if asked == "native" else flashinfer.missing(capability)
    if asked == "flashinfer" and why:
        raise DeviceError(f"--attention flashinfer was asked for on {place}: {why}; or use --attention native")
    if why and capability is not None:
        log.info("attention is served by Triton: %s", why)
    if asked == "native" or why:
        return lambda kinds, dtype: Native()
    return partial(flashinfer.FlashInfer, flashinfer.library(), place=place)
