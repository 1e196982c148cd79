"""Attention over pages on GPUs: a program for some rows of a sequence, the query heads of one key head, and a stretch of its keys.

Programs keep the softmax of their stretch; where a context was cut into several, a second kernel joins them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.stored import FORMATS, as_held
from kvrun_kernels.tiles import INT8, owner, product, rounded, up_to_power, widened

PROGRAMS = 256  # that a GPU wants at least, about two for each processor of a large one; a power of two, for so many stretches are joined
LEAST_CUT = 512  # keys


@triton.jit
def _scales(rows, dim):
    """The float32 that ends each row of int8 codes, from its bytes: rows of odd length leave it where no wider load may go."""
    bits = tl.load(rows + dim).to(tl.uint32) | (tl.load(rows + dim + 1).to(tl.uint32) << 8)
    bits |= (tl.load(rows + dim + 2).to(tl.uint32) << 16) | (tl.load(rows + dim + 3).to(tl.uint32) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["sequences", "table_stride", "parts"])
def _attend(
    out, stats, q, pool, query_start, contexts, page_table, reach, slopes, sinks, relative,
    sequences, kv_heads, group, dim, value_dim, width, page_tokens, planes, token_stride, head_stride, table_stride, parts,
    window, most, scale, softcap,
    FORMAT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, REACH: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr,
    RELATIVE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(2)
    sequence, start = owner(query_start, sequences, block, TOKENS)
    stop = tl.load(query_start + sequence + 1)
    if start < stop:
        context = tl.load(contexts + sequence)
        blocks_of_heads = (group + HEADS - 1) // HEADS
        kv_head = tl.program_id(1) // blocks_of_heads
        at = tl.arange(0, BLOCK_M)
        row = start + at // HEADS
        of_group = tl.program_id(1) % blocks_of_heads * HEADS + at % HEADS
        head = kv_head * group + of_group
        mine = (at < TOKENS * HEADS) & (row < stop) & (of_group < group)
        position = context - stop + row
        last = tl.minimum(tl.load(reach + row, mine, other=-1) if REACH else position, context - 1)
        last = tl.where(mine, last, -1)
        # By its own context, for a captured step's table is as wide as the longest sequence there may be.
        cut = tl.cdiv(tl.cdiv(context, parts), BLOCK_N) * BLOCK_N
        begin = part * cut
        end = tl.minimum(tl.max(last) + 1, begin + cut)
        if WINDOW:
            begin = tl.maximum(begin, context - stop + start - window + 1)
        d, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        inner = tl.load(
            q + row.to(tl.int64)[:, None] * token_stride + head[:, None] * head_stride + d[None, :],
            mine[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        if WIDE:
            inner = inner.to(tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for key0 in range(begin, end, BLOCK_N):
            key = key0 + tl.arange(0, BLOCK_N)
            held = key < end
            page = tl.load(page_table + sequence.to(tl.int64) * table_stride + key // page_tokens, held, other=0).to(tl.int64)
            stored = pool + ((page * planes * kv_heads + kv_head) * page_tokens + key % page_tokens) * width
            values_at = stored + (planes - 1) * kv_heads * page_tokens * width
            keys = tl.load(stored[None, :] + d[:, None], (d < dim)[:, None] & held[None, :], other=0)
            if FORMAT > 2 or WIDE:
                keys = rounded(widened(keys, FORMAT), inner.dtype)
            scores = product(inner, keys, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
            if FORMAT == INT8:
                scores *= _scales(tl.where(held, stored, pool), dim)[None, :]
            if SOFTCAP:
                # tanh(u) = 2 * sigmoid(2u) - 1
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            ahead = key[None, :] - position[:, None]
            if SLOPES:
                scores += tl.load(slopes + head, mine, other=0.0)[:, None] * ahead
            if RELATIVE:
                steps = tl.minimum(tl.maximum(ahead, -most), most) + most
                scores += tl.load(relative + head[:, None] * (2 * most + 1) + steps, mine[:, None], other=0.0)
            seen = held[None, :] & (key[None, :] <= last[:, None])
            if WINDOW:
                seen = seen & (ahead > -window)
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen nothing yet: any finite number, for -inf - -inf is none.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            shares = tl.exp(scores - level[:, None])
            fade = tl.exp(top - level)
            weight = weight * fade + tl.sum(shares, 1)
            top = higher
            values = tl.load(values_at[:, None] + v[None, :], held[:, None] & (v < value_dim)[None, :], other=0)
            if FORMAT > 2 or WIDE:
                values = rounded(widened(values, FORMAT), inner.dtype)
            if FORMAT == INT8:
                shares *= tl.where(held, _scales(tl.where(held, values_at, pool), dim), 0.0)[None, :]
            total = product(rounded(shares, inner.dtype), values, total * fade[:, None])
        line = (row.to(tl.int64) * kv_heads * group + head) * parts + part
        if SPLIT:
            tl.store(stats + line * 2, top, mine)
            tl.store(stats + line * 2 + 1, weight, mine)
        else:
            if SINKS:
                sink = tl.load(sinks + head, mine, other=0.0)
                level = tl.maximum(top, sink)
                weight = weight * tl.exp(top - level) + tl.exp(sink - level)
                total *= tl.exp(top - level)[:, None]
            total /= tl.where(weight == 0.0, 1.0, weight)[:, None]
        target = out + line[:, None] * value_dim + v[None, :]
        tl.store(target, rounded(total, out.dtype.element_ty), mine[:, None] & (v < value_dim)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _join(out, totals, stats, sinks, heads, value_dim, parts, SINKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    part, v = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    top = tl.load(stats + (line * parts + part) * 2, part < parts, other=float("-inf"))
    weight = tl.load(stats + (line * parts + part) * 2 + 1, part < parts, other=0.0)
    level = tl.max(top)
    if SINKS:
        sink = tl.load(sinks + line % heads)
        level = tl.maximum(level, sink)
    level = tl.where(level == float("-inf"), 0.0, level)
    fade = tl.exp(top - level)
    whole = tl.sum(weight * fade)
    if SINKS:
        whole += tl.exp(sink - level)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for p in range(parts):
        faded = tl.exp(tl.load(stats + (line * parts + p) * 2) - level)
        total += faded * tl.load(totals + (line * parts + p) * value_dim + v, v < value_dim, other=0.0)
    total /= tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + line * value_dim + v, rounded(total, out.dtype.element_ty), v < value_dim)


def paged_attention(
    q: Tensor, pool: Tensor, query_start: Tensor, contexts: Tensor, page_table: Tensor, scale: float, window: int, softcap: float,
    slopes: Tensor | None, sinks: Tensor | None, reach: Tensor | None, relative: Tensor | None, value_dim: int,
) -> Tensor:  # fmt: skip
    tokens, heads, dim = q.shape
    sequences, kv_heads, page_tokens = contexts.shape[0], pool.shape[2], pool.shape[3]
    group = heads // kv_heads
    # Rows of sequences without blocks of their own stay zero.
    out = torch.zeros((tokens, heads, value_dim), dtype=q.dtype, device=q.device)
    if not tokens or not sequences:
        return out
    few = tokens <= 2 * sequences
    wide = up_to_power(dim, 16)
    # Sides that keep a program within its registers.
    tall = max(16, min(64, 8192 // wide) if q.dtype != torch.float32 else min(32, 2048 // wide))
    block_m = up_to_power(group, 16, tall) if few else tall
    held_heads = min(group, block_m)
    of_tokens = block_m // held_heads
    block_n = max(16, tall // 2) if FORMATS[pool.dtype] > 2 else tall
    grid = (tokens // of_tokens + sequences, kv_heads * triton.cdiv(group, held_heads))
    longest = page_table.shape[1] * page_tokens
    parts = max(1, min(triton.cdiv(PROGRAMS, grid[0] * grid[1]), longest // LEAST_CUT))
    target, stats = out, out
    if parts > 1:
        target = torch.empty((tokens, heads, parts, value_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((tokens, heads, parts, 2), dtype=torch.float32, device=q.device)
    absent = contexts  # a pointer that is not followed
    block_v = up_to_power(value_dim, 16)
    _attend[grid[0], grid[1], parts](
        target, stats, q, as_held(pool), query_start, contexts, page_table,
        *(absent if t is None else t for t in (reach, slopes, sinks, relative)),
        sequences, kv_heads, group, dim, value_dim, pool.shape[4], page_tokens, pool.shape[1],
        q.stride(0), q.stride(1), page_table.stride(0), parts, window, 0 if relative is None else relative.shape[1] // 2, scale, softcap,
        FORMAT=FORMATS[pool.dtype], WIDE=pool.dtype != q.dtype and FORMATS[pool.dtype] <= 2, SPLIT=parts > 1, REACH=reach is not None,
        SLOPES=slopes is not None, SINKS=sinks is not None, RELATIVE=relative is not None, WINDOW=window > 0, SOFTCAP=softcap > 0,
        HEADS=held_heads, TOKENS=of_tokens, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=wide, BLOCK_V=block_v,
        num_warps=8 if wide > 256 else 4, num_stages=1 if wide > 256 and q.dtype == torch.float32 else 2,
    )  # fmt: skip
    if parts > 1:
        _join[(tokens * heads,)](
            out, target, stats, absent if sinks is None else sinks, heads, value_dim, parts,
            SINKS=sinks is not None, BLOCK_P=PROGRAMS, BLOCK_V=block_v, num_warps=1,
        )  # fmt: skip
    return out
