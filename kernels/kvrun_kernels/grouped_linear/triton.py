"""Products of grouped rows on GPUs: a program for some rows of a group and some of its outputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.grouped import Grouped
from kvrun_kernels.linear.op import PackedLinear
from kvrun_kernels.tiles import TYPES, owner, product, rounded, up_to_power


@triton.jit
def _multiply(
    out, x, table, offsets, groups, outputs, inputs, x_stride,
    DTYPE: tl.constexpr, BIAS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group, start = owner(offsets, groups, tl.program_id(0), BLOCK_M)
    stop = tl.load(offsets + group + 1)
    if start < stop:
        row, n = start + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mine, held = row < stop, n < outputs
        weight = tl.load(table + group * 2).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            weight = tl.multiple_of(weight, 16)
        x_start, n_start = row.to(tl.int64) * x_stride, n.to(tl.int64) * inputs
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(0, inputs, BLOCK_K):
            k = at + tl.arange(0, BLOCK_K)
            inside = (k < inputs)[None, :]
            inner = tl.load(x + x_start[:, None] + k[None, :], mine[:, None] & inside, other=0.0)
            factor = tl.load(weight + n_start[:, None] + k[None, :], held[:, None] & inside, other=0.0)
            if inner.dtype != DTYPE:
                inner, factor = inner.to(tl.float32), factor.to(tl.float32)
            total = product(inner, tl.trans(factor), total)
        if BIAS is not None:
            total += tl.load(tl.load(table + group * 2 + 1).to(tl.pointer_type(BIAS)) + n, held, other=0.0).to(tl.float32)[None, :]
        target = out + row.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(target, rounded(total, out.dtype.element_ty), mine[:, None] & held[None, :])


def grouped_linear(x: Tensor, grouped: Grouped[PackedLinear], offsets: Tensor) -> Tensor:
    """As the op says."""
    rows, first, bias_dtype = x.shape[0], grouped.first, grouped.bias_dtype
    outputs, inputs = first.out_features, first.in_features
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not rows or not outputs:
        return out
    # Rows that a group has if they spread evenly: few of them leave a taller tile empty.
    exact = torch.float32 in (x.dtype, first.dtype)  # which no tensor core multiplies: twice the bytes, and every product in registers
    block_m = up_to_power(rows // len(grouped), 16, 32 if exact else 64)
    block_n, block_k = (64, 32) if exact else (64, 128) if block_m == 16 else (128, 64)
    aligned = inputs * x.element_size() % 16 == 0 and all(p.held.data_ptr() % 16 == 0 for p in grouped.packed)
    _multiply[(rows // block_m + len(grouped), triton.cdiv(outputs, block_n))](
        out, x, grouped.table, offsets, len(grouped), outputs, inputs, x.stride(0),
        DTYPE=TYPES[first.dtype], BIAS=None if bias_dtype is None else TYPES[bias_dtype], ALIGNED=aligned,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
