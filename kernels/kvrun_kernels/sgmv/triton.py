"""Low-rank updates on GPUs: first every x @ a.T, by tiles of rows and ranks, then every update of y."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.sgmv.op import LoraSegments
from kvrun_kernels.sgmv.table import ITEM, TILE, UPDATE, LoraTable
from kvrun_kernels.tiles import TYPES, product, rounded

CUT = 1024  # inputs of one program: a constant, so that a row's sums are formed in one order in every batch

_TILE, _ITEM, _UPDATE = tl.constexpr(TILE), tl.constexpr(ITEM), tl.constexpr(UPDATE)


@triton.jit
def _pointer(number, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    found = number.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(found, 16) if ALIGNED else found


@triton.jit
def _shrink(inner, x, items, inputs, x_stride, cut, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr):
    item, part = tl.program_id(0), tl.program_id(1)
    entry = items + item * _ITEM
    rows = tl.load(entry + 1)
    if rows > 0:
        start, ranks = tl.load(entry), tl.load(entry + 3)
        a = _pointer(tl.load(entry + 2), DTYPE, ALIGNED)
        at = tl.arange(0, _TILE)
        x_start, a_start = (start + at) * x_stride, at.to(tl.int64) * inputs
        total = tl.zeros((_TILE, _TILE), tl.float32)
        for first in range(part * cut, min(part * cut + cut, inputs), BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            held = (k < inputs)[None, :]
            values = tl.load(x + x_start[:, None] + k[None, :], (at < rows)[:, None] & held, other=0.0)
            weight = tl.load(a + a_start[:, None] + k[None, :], (at < ranks)[:, None] & held, other=0.0)
            if values.dtype != DTYPE:
                values, weight = values.to(tl.float32), weight.to(tl.float32)
            total = product(values, tl.trans(weight), total)
        target = inner + (part * tl.num_programs(0) + item) * _TILE * _TILE
        tl.store(target + at[:, None] * _TILE + at[None, :], total)


@triton.jit
def _expand(
    y, inner, updates, items, parts, y_stride, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr
):
    entry = updates + tl.program_id(1) * _UPDATE
    rows, columns = tl.load(entry + 1), tl.load(entry + 4)
    first = tl.program_id(0) * BLOCK_N
    if (rows > 0) & (first < columns):
        start, rank, column, item = tl.load(entry), tl.load(entry + 3), tl.load(entry + 5), tl.load(entry + 6)
        bt = _pointer(tl.load(entry + 2), DTYPE, ALIGNED)
        at, n = tl.arange(0, _TILE), first + tl.arange(0, BLOCK_N)
        total = tl.zeros((_TILE, BLOCK_N), tl.float32)
        for low in range(0, rank, _TILE):
            source = inner + (item + low // _TILE) * _TILE * _TILE + at[:, None] * _TILE + at[None, :]
            between = tl.zeros((_TILE, _TILE), tl.float32)
            for part in range(parts):
                between += tl.load(source + part * items * _TILE * _TILE)
            held = ((low + at) < rank)[:, None] & (n < columns)[None, :]
            weight = tl.load(bt + (low + at)[:, None] * columns + n[None, :], held, other=0.0)
            total = tl.dot(between, weight.to(tl.float32), total, input_precision=PRECISION)
        target = y + (start + at)[:, None] * y_stride + (column + n)[None, :]
        mine = (at < rows)[:, None] & (n < columns)[None, :]
        changed = tl.load(target, mine, other=0.0).to(tl.float32) + total
        tl.store(target, rounded(changed, y.dtype.element_ty), mine)


def lora(y: Tensor, x: Tensor, segments: LoraSegments | LoraTable) -> None:
    """As the op says; what lies between A and B meets a B of 16 bits as tf32, whose 11 bits hold that B exactly."""
    table = segments if isinstance(segments, LoraTable) else segments.on_gpu
    parts = triton.cdiv(table.inputs, CUT)
    inner = torch.empty(parts * table.items * TILE * TILE, dtype=torch.float32, device=x.device)
    items, updates = table.held, table.held[table.items * ITEM :]
    shared = {"DTYPE": TYPES[table.dtype], "ALIGNED": table.aligned}
    _shrink[(table.items, parts)](inner, x, items, table.inputs, x.stride(0), CUT, BLOCK_K=128, num_warps=2, **shared)
    block_n = 128
    _expand[(triton.cdiv(table.columns, block_n), table.updates)](
        y, inner, updates, table.items, parts, y.stride(0),
        PRECISION="ieee" if table.dtype == torch.float32 else "tf32", BLOCK_N=block_n, num_warps=4, **shared,
    )  # fmt: skip
