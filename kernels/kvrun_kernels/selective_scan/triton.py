"""Mamba's recurrence on GPUs: a program for a sequence and some of its channels, row by row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.tiles import rounded, softplus, up_to_power


@triton.jit
def _scan(
    out, x, dt, z, a, b, c, d, dt_bias, query_start, slots, fresh, state, channels, size,
    x_stride, dt_stride, z_stride, b_stride, c_stride, GATED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    channel, s = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    held, inside = channel < channels, s < size
    both = held[:, None] & inside[None, :]
    start, stop = tl.load(query_start + sequence), tl.load(query_start + sequence + 1)
    decay = tl.load(a + channel[:, None] * size + s[None, :], both, other=0.0)
    straight, shift = tl.load(d + channel, held, other=0.0), tl.load(dt_bias + channel, held, other=0.0)
    kept = state + (tl.load(slots + sequence).to(tl.int64) * channels + channel)[:, None] * size + s[None, :]
    # No channel of a sequence that begins here has a past.
    old = (channel < tl.where(tl.load(fresh + sequence) > 0, 0, channels))[:, None]
    h = tl.load(kept, old & inside[None, :], other=0.0)
    for row in range(start, stop):
        at = start.to(tl.int64) + (row - start)
        value = tl.load(x + at * x_stride + channel, held, other=0.0).to(tl.float32)
        step = softplus(tl.load(dt + at * dt_stride + channel, held, other=0.0).to(tl.float32) + shift)
        into = tl.load(b + at * b_stride + s, inside, other=0.0).to(tl.float32)
        outof = tl.load(c + at * c_stride + s, inside, other=0.0).to(tl.float32)
        h = h * tl.exp(step[:, None] * decay) + (step * value)[:, None] * into[None, :]
        y = tl.sum(h * outof[None, :], 1) + straight * value
        if GATED:
            gate = tl.load(z + at * z_stride + channel, held, other=0.0).to(tl.float32)
            y *= gate * tl.sigmoid(gate)
        tl.store(out + at * channels + channel, rounded(y, out.dtype.element_ty), held)
    if start < stop:
        tl.store(kept, h, both)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor,
    query_start: Tensor, slots: Tensor, fresh: Tensor, state: Tensor, z: Tensor | None,
) -> Tensor:  # fmt: skip
    channels, size = a.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_s = up_to_power(size)
    block_c = up_to_power(channels, 1, max(1, 1024 // block_s))
    gate = x if z is None else z
    if slots.shape[0]:
        _scan[(slots.shape[0], triton.cdiv(channels, block_c))](
            out, x, dt, gate, a, b, c, d, dt_bias, query_start, slots, fresh.view(torch.uint8), state, channels, size,
            x.stride(0), dt.stride(0), gate.stride(0), b.stride(0), c.stride(0),
            GATED=z is not None, BLOCK_C=block_c, BLOCK_S=block_s, num_warps=2,
        )  # fmt: skip
    return out
