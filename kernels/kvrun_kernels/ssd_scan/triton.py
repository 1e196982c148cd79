"""The recurrence of Mamba 2 on GPUs: a program for a head of a sequence and some of its dimensions, row by row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.tiles import rounded, softplus, up_to_power


@triton.jit
def _scan(
    out, x, dt, z, a, b, c, d, dt_bias, query_start, slots, fresh, state, heads, dim, size, shared, least, most,
    x_stride, dt_stride, z_stride, b_stride, c_stride, GATED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    place, s = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    held, inside = place < dim, s < size
    both = held[:, None] & inside[None, :]
    start, stop = tl.load(query_start + sequence), tl.load(query_start + sequence + 1)
    decay, straight, shift = tl.load(a + head), tl.load(d + head), tl.load(dt_bias + head)
    kept = state + ((tl.load(slots + sequence).to(tl.int64) * heads + head) * dim + place)[:, None] * size + s[None, :]
    # Nothing of a sequence that begins here has a past.
    old = (place < tl.where(tl.load(fresh + sequence) > 0, 0, dim))[:, None]
    h = tl.load(kept, old & inside[None, :], other=0.0)
    for row in range(start, stop):
        at = start.to(tl.int64) + (row - start)
        value = tl.load(x + at * x_stride + head * dim + place, held, other=0.0).to(tl.float32)
        step = softplus(tl.load(dt + at * dt_stride + head).to(tl.float32) + shift)
        step = tl.minimum(tl.maximum(step, least), most)
        into = tl.load(b + at * b_stride + head // shared * size + s, inside, other=0.0).to(tl.float32)
        outof = tl.load(c + at * c_stride + head // shared * size + s, inside, other=0.0).to(tl.float32)
        h = h * tl.exp(step * decay) + (step * value)[:, None] * into[None, :]
        y = tl.sum(h * outof[None, :], 1) + straight * value
        if GATED:
            gate = tl.load(z + at * z_stride + head * dim + place, held, other=0.0).to(tl.float32)
            y *= gate * tl.sigmoid(gate)
        tl.store(out + (at * heads + head) * dim + place, rounded(y, out.dtype.element_ty), held)
    if start < stop:
        tl.store(kept, h, both)


def ssd_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor,
    query_start: Tensor, slots: Tensor, fresh: Tensor, state: Tensor, z: Tensor | None, least: float, most: float,
) -> Tensor:  # fmt: skip
    heads, dim, size = x.shape[1], x.shape[2], b.shape[2]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_s = up_to_power(size)
    block_d = up_to_power(dim, 1, max(1, 2048 // block_s))
    gate = x if z is None else z
    if slots.shape[0]:
        _scan[(slots.shape[0], heads, triton.cdiv(dim, block_d))](
            out, x, dt, gate, a, b, c, d, dt_bias, query_start, slots, fresh.view(torch.uint8), state, heads, dim, size,
            heads // b.shape[1], least, most, x.stride(0), dt.stride(0), gate.stride(0), b.stride(0), c.stride(0),
            GATED=z is not None, BLOCK_D=block_d, BLOCK_S=block_s, num_warps=2,
        )  # fmt: skip
    return out
