"""Products of grouped rows with codes of their own on GPUs: a program for some rows of a group and some of its outputs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.grouped import Grouped
from kvrun_kernels.quantized_linear.op import in_8_bits
from kvrun_kernels.quantized_linear.rows import QuantizedRows
from kvrun_kernels.quantized_linear.triton import added, described
from kvrun_kernels.tiles import TYPES, owner, rounded, up_to_power

COLUMNS = 6  # of the table: codes, scales, offsets, table of 16, units, bias


@triton.jit
def _multiply(
    out, x, addresses, bounds, groups, outputs, inputs, x_stride, code_stride, group, block,
    FORM: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr, ADDED: tl.constexpr, COUNTS: tl.constexpr, BIAS: tl.constexpr,
    UNIT: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    owned, start = owner(bounds, groups, tl.program_id(0), BLOCK_M)
    stop = tl.load(bounds + owned + 1)
    if start < stop:
        row, n = start + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mine, held = row < stop, n < outputs
        at = addresses + owned * COLUMNS
        codes = tl.multiple_of(tl.load(at).to(tl.pointer_type(tl.uint8)), 16)
        scales = tl.load(at + 1).to(tl.pointer_type(SCALE))
        offsets = tl.load(at + 2).to(tl.pointer_type(ADDED))
        table = tl.load(at + 3).to(tl.pointer_type(tl.float32))
        units = tl.load(at + 4).to(tl.pointer_type(tl.float16))
        total = added(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, row.to(tl.int64) * x_stride, mine, codes, n, held, code_stride, scales, offsets,
            table, units, tl.load(table), 0, inputs, inputs, outputs, group, block,
            FORM, OFFSET, COUNTS, UNIT, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if BIAS is not None:
            total += tl.load(tl.load(at + 5).to(tl.pointer_type(BIAS)) + n, held, other=0.0).to(tl.float32)[None, :]
        target = out + row.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(target, rounded(total, out.dtype.element_ty), mine[:, None] & held[None, :])


def grouped_quantized_linear(x: Tensor, grouped: Grouped[QuantizedRows], offsets: Tensor, *, rounded: bool = False) -> Tensor:
    """As the op says; inputs in 8 bits are rounded here as everywhere, but multiplied in float32."""
    rows, first, bias_dtype = x.shape[0], grouped.first, grouped.bias_dtype
    out = torch.empty((rows, first.out_features), dtype=x.dtype, device=x.device)
    if not rows or not first.out_features:
        return out
    if rounded and first.integers:
        x = in_8_bits(x, first.group)
    # Rows that a group has if they spread evenly: few of them leave a taller tile empty.
    block_m = up_to_power(rows // len(grouped), 16, 64 if x.dtype != torch.float32 else 32)
    kind = described(first, x, block_m == 16)
    _multiply[(rows // block_m + len(grouped), triton.cdiv(first.out_features, kind["BLOCK_N"]))](
        out, x, grouped.table, offsets, len(grouped), first.out_features, first.in_features,
        x.stride(0), first.panels.stride(0), first.group, first.block,
        SCALE=TYPES.get(first.scales.dtype, tl.int8), ADDED=tl.int8 if first.offsets is None else TYPES.get(first.offsets.dtype, tl.int8),
        BIAS=None if bias_dtype is None else TYPES[bias_dtype], COLUMNS=COLUMNS, BLOCK_M=block_m, num_warps=4, **kind,
    )  # fmt: skip
    return out
