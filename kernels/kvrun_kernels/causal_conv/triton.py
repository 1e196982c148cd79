"""The short convolution on GPUs: a program for a sequence and some of its channels, row by row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.tiles import rounded, up_to_power


@triton.jit
def _convolve(
    out, x, weight, bias, query_start, slots, fresh, state, channels, taps, x_stride,
    BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.arange(0, BLOCK_T)
    held = channel < channels
    start, stop = tl.load(query_start + sequence), tl.load(query_start + sequence + 1)
    filters = tl.load(weight + channel[:, None] * taps + tap[None, :], held[:, None] & (tap < taps)[None, :], other=0.0).to(tl.float32)
    past = state + (tl.load(slots + sequence).to(tl.int64) * channels + channel)[:, None] * (taps - 1)
    # No channel of a sequence that begins here has a past.
    old = (channel < tl.where(tl.load(fresh + sequence) > 0, 0, channels))[:, None]
    for row in range(start, stop):
        # The last tap meets the row itself; what lies before the first row is the state's.
        source = row - (taps - 1) + tap[None, :]
        here = held[:, None] & (tap < taps)[None, :] & (source >= start)
        before = old & (tap < taps)[None, :] & (source < start)
        line = tl.load(x + source.to(tl.int64) * x_stride + channel[:, None], here, other=0.0).to(tl.float32)
        line += tl.load(past + (source - start + taps - 1), before, other=0.0).to(tl.float32)
        total = tl.sum(line * filters, 1)
        if BIAS:
            total += tl.load(bias + channel, held, other=0.0).to(tl.float32)
        if SILU:
            total = total * tl.sigmoid(total)
        tl.store(out + (start.to(tl.int64) + (row - start)) * channels + channel, rounded(total, out.dtype.element_ty), held)
    if start < stop:
        source = stop - (taps - 1) + tap[None, :]
        kept = held[:, None] & (tap < taps - 1)[None, :]
        line = tl.load(x + source.to(tl.int64) * x_stride + channel[:, None], kept & (source >= start), other=0.0).to(tl.float32)
        line += tl.load(past + (source - start + taps - 1), kept & old & (source < start), other=0.0).to(tl.float32)
        # Every thread has read the old state before any writes the new one.
        tl.debug_barrier()
        tl.store(past + tap[None, :], rounded(line, state.dtype.element_ty), kept)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_start: Tensor, slots: Tensor, fresh: Tensor, state: Tensor, act: str | None
) -> Tensor:
    channels, taps = weight.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_c = up_to_power(channels, 1, 64)
    if x.shape[0] and slots.shape[0]:
        _convolve[(slots.shape[0], triton.cdiv(channels, block_c))](
            out, x, weight, weight if bias is None else bias, query_start, slots, fresh.view(torch.uint8), state,
            channels, taps, x.stride(0),
            BIAS=bias is not None, SILU=act is not None, BLOCK_C=block_c, BLOCK_T=up_to_power(taps), num_warps=2,
        )  # fmt: skip
    return out
