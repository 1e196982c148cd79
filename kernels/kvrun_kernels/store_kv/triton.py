"""Writing keys and values into pages on GPUs: a program for a token and some of its heads."""

import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.stored import FORMATS, as_held
from kvrun_kernels.tiles import INT8, narrowed, to_whole, up_to_power


@triton.jit
def _store(
    x, pool, slots, heads, dim, given, width, page_tokens, token_stride, head_stride, planes, plane,
    FORMAT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(slots + token).to(tl.int64)
    mine = (head < heads)[:, None]
    source = x + token * token_stride + head[:, None] * head_stride + d[None, :]
    # What is missing of a value's place is zeroed.
    values = tl.load(source, mine & (d < given)[None, :], other=0.0).to(tl.float32)
    row = ((slot // page_tokens * planes + plane) * heads + head) * page_tokens + slot % page_tokens
    target = pool + (row * width)[:, None]
    if FORMAT == INT8:
        whole = tl.min((tl.abs(values) < float("inf")).to(tl.int32), 1) > 0
        scale = tl.div_rn(tl.max(tl.abs(values), 1), 127.0)
        codes = tl.where((whole & (scale > 0))[:, None], to_whole(tl.div_rn(values, tl.where(scale > 0, scale, 1.0)[:, None])), 0.0)
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int32).to(tl.uint8)
        tl.store(target + d[None, :], codes, mine & (d < dim)[None, :])
        # Byte by byte: a row of odd length leaves its scale where no wider store may go.
        bits = tl.where(whole, scale, float("nan")).to(tl.uint32, bitcast=True)
        place = tl.arange(0, 4)
        tl.store(target + dim + place[None, :], (bits[:, None] >> (place * 8)[None, :]).to(tl.uint8), mine & (place < 4)[None, :])
    else:
        tl.store(target + d[None, :], narrowed(values, FORMAT, pool.dtype.element_ty), mine & (d < dim)[None, :])


def store_kv(k: Tensor, v: Tensor | None, pool: Tensor, slots: Tensor) -> None:
    tokens, heads, dim = k.shape
    block_d = up_to_power(dim)
    block_h = up_to_power(heads, 1, max(1, 1024 // block_d))
    for plane, x in enumerate((k,) if v is None else (k, v)):
        if tokens:
            _store[(tokens, triton.cdiv(heads, block_h))](
                x, as_held(pool), slots, heads, dim, x.shape[2], pool.shape[4], pool.shape[3], x.stride(0), x.stride(1),
                pool.shape[1], plane, FORMAT=FORMATS[pool.dtype], BLOCK_H=block_h, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip
