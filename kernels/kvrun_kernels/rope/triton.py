"""Rotary position embedding on GPUs, in place: a program for a token and some of its heads."""

import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.tiles import rounded, up_to_power


@triton.jit
def _rotate(
    heads, positions, cos, sin, count, pairs, token_stride, head_stride, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_R)
    held = (head < count)[:, None] & (pair < pairs)[None, :]
    angle = tl.load(positions + token).to(tl.int64) * pairs + pair
    c = tl.load(cos + angle, pair < pairs, other=0.0)[None, :]
    s = tl.load(sin + angle, pair < pairs, other=0.0)[None, :]
    start = heads + token * token_stride + head[:, None] * head_stride
    first = start + (pair if HALF else pair * 2)[None, :]
    second = first + (pairs if HALF else 1)
    a, b = tl.load(first, held, other=0.0).to(tl.float32), tl.load(second, held, other=0.0).to(tl.float32)
    tl.store(first, rounded(a * c - b * s, heads.dtype.element_ty), held)
    tl.store(second, rounded(b * c + a * s, heads.dtype.element_ty), held)


def rotate(heads: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, style: str) -> None:
    """Rotate heads [tokens, heads, dim]; cos and sin contiguous."""
    tokens, count, _ = heads.shape
    if not tokens or not cos.shape[1]:
        return
    block_r = up_to_power(cos.shape[1])
    block_h = up_to_power(count, 1, max(1, 1024 // block_r))
    _rotate[(tokens, triton.cdiv(count, block_h))](
        heads, positions, cos, sin, count, cos.shape[1], heads.stride(0), heads.stride(1),
        HALF=style == "half", BLOCK_H=block_h, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip
