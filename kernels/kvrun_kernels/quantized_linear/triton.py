"""Products with weights of 4 or 8 bits on GPUs: codes meet the inputs in a tensor core, scales meet their sums.

Codes are exact in every dtype of inputs but for tables of fractions (nf4, fp4), which are rounded to it. A scale multiplies the
sum over its group in float32. Only groups that no tile fits (not a multiple of 16) scale each weight and round it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.quantized_linear.op import FLOAT8_UNIT, in_8_bits
from kvrun_kernels.quantized_linear.rows import QuantizedRows
from kvrun_kernels.quantized_linear.scaled import scaled, serves
from kvrun_kernels.tiles import e4m3, float8, product, rounded, up_to_power

FEW_ROWS = 16  # up to here the weight's bytes are all that counts, and its inputs are cut among programs
PROGRAMS = 256  # that then share a weight, about two for each processor of a large GPU
LEAST_CUT = 512  # inputs

_FORMS = {torch.int8: 0, torch.float8_e4m3fn: 1}
_COUNTED, _TABLE = 2, 3
_NO_OFFSET, _SHIFT, _ADDED = range(3)


@triton.jit
def _values(codes, row_start, held_rows, at, inputs, table, first, FORM: tl.constexpr, BLOCK_K: tl.constexpr):
    """What codes [outputs, BLOCK_K] from input `at` stand for before their scale, float32; zeros beyond the end do no harm."""
    if FORM < 2:
        k = at + tl.arange(0, BLOCK_K)
        raw = tl.load(codes + row_start[:, None] + k[None, :], held_rows[:, None] & (k < inputs)[None, :], other=0)
        values = e4m3(raw) if FORM == 1 else raw.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        pair = at // 2 + tl.arange(0, BLOCK_K // 2)
        raw = tl.load(codes + row_start[:, None] + pair[None, :], held_rows[:, None] & (pair * 2 < inputs)[None, :], other=0)
        nibbles = tl.interleave(raw & 15, raw >> 4)
        values = nibbles.to(tl.float32) + first if FORM == 2 else tl.load(table + nibbles.to(tl.int32))
    return values


@triton.jit
def added(
    total, x, x_start, mine, codes, n, held, code_stride, scales, offsets, table, units, first, first_input, last_input, inputs, outputs,
    group, block, FORM: tl.constexpr, OFFSET: tl.constexpr, COUNTS: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + the products of a tile's rows, which begin at x_start, with outputs n over inputs from the first to the last."""
    row_start = n.to(tl.int64) * code_stride
    SIDES: tl.constexpr = 2 if OFFSET else 1
    for at in range(first_input, last_input, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        inner = tl.load(x + x_start[:, None] + k[None, :], mine[:, None] & (k < inputs)[None, :], other=0.0)
        weight = _values(codes, row_start, held, at, inputs, table, first, FORM, BLOCK_K)
        if WHOLE:
            # The tile lies in one group: its sum is scaled, and an offset adds the inputs' own sum.
            of_group = (at // group) * outputs + n
            scale = tl.load(scales + of_group, held, other=0).to(tl.float32) * UNIT
            of_unit = at // group // block * SIDES * outputs + n if COUNTS else of_group
            if COUNTS:
                scale *= tl.load(units + of_unit, held, other=0.0).to(tl.float32)
            sums = product(inner, tl.trans(rounded(weight, inner.dtype)), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            total += sums * scale[None, :]
            if OFFSET:
                offset = tl.load(offsets + of_group, held, other=0).to(tl.float32)
                if COUNTS:
                    offset *= tl.load(units + of_unit + outputs, held, other=0.0).to(tl.float32)
                total += tl.sum(inner.to(tl.float32), 1)[:, None] * (offset * scale if OFFSET == 1 else offset)[None, :]
        else:
            of_group = (k // group)[None, :] * outputs + n[:, None]
            both = held[:, None] & (k < inputs)[None, :]
            scale = tl.load(scales + of_group, both, other=0).to(tl.float32) * UNIT
            of_unit = (k // group // block)[None, :] * SIDES * outputs + n[:, None] if COUNTS else of_group
            if COUNTS:
                scale *= tl.load(units + of_unit, both, other=0.0).to(tl.float32)
            if OFFSET:
                offset = tl.load(offsets + of_group, both, other=0).to(tl.float32)
                if COUNTS:
                    offset *= tl.load(units + of_unit + outputs, both, other=0.0).to(tl.float32)
                weight = (weight + offset) * scale if OFFSET == 1 else weight * scale + offset
            else:
                weight = weight * scale
            total = product(inner, tl.trans(rounded(weight, inner.dtype)), total)
    return total


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    out, x, codes, scales, offsets, table, units, bias, rows, outputs, inputs, x_stride, code_stride, group, block, cut, first,
    FORM: tl.constexpr, OFFSET: tl.constexpr, COUNTS: tl.constexpr, BIAS: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    mine, held = m < rows, n < outputs
    total = added(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, m.to(tl.int64) * x_stride, mine, codes, n, held, code_stride,
        scales, offsets, table, units, first, part * cut, min(part * cut + cut, inputs), inputs, outputs, group, block,
        FORM, OFFSET, COUNTS, UNIT, WHOLE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if BIAS:
        total += tl.load(bias + n, held, other=0.0).to(tl.float32)[None, :]
    target = out + (part.to(tl.int64) * rows + m[:, None]) * outputs + n[None, :]
    tl.store(target, rounded(total, out.dtype.element_ty), mine[:, None] & held[None, :])


@triton.jit(do_not_specialize=["count", "rows"])
def _add_parts(out, parts, bias, count, rows, outputs, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    elements = rows.to(tl.int64) * outputs
    held = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * elements + at, held, other=0.0)
    if BIAS:
        total += tl.load(bias + at % outputs, held, other=0.0).to(tl.float32)
    tl.store(out + at, rounded(total, out.dtype.element_ty), held)


@triton.jit
def _narrow(codes, steps, x, inputs, x_stride, code_stride, BLOCK: tl.constexpr):
    """A row of x as `in_float8` has it."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, inputs, BLOCK):
        k = at + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + row * x_stride + k, k < inputs, other=0.0).to(tl.float32)))
    most = tl.max(largest, 0)
    step = tl.where(most > 0, tl.div_rn(most, 448.0), 1.0)
    tl.store(steps + row, step)
    for at in range(0, inputs, BLOCK):
        k = at + tl.arange(0, BLOCK)
        value = tl.load(x + row * x_stride + k, k < inputs, other=0.0).to(tl.float32)
        tl.store(codes + row * code_stride + k, float8(tl.div_rn(value, step), 3, 7, 448.0), k < inputs)


def narrowed(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `in_float8`: the same numbers, made in one launch."""
    rows, inputs = x.shape
    codes = torch.empty((rows, inputs), dtype=torch.uint8, device=x.device)
    steps = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _narrow[(rows,)](codes, steps, x, inputs, x.stride(0), inputs, BLOCK=1024, num_warps=4)
    return codes.view(torch.float8_e4m3fn), steps


def described(packed: QuantizedRows, x: Tensor, few: bool) -> dict[str, Any]:
    """What a weight's numbers are, and the tile that a program takes of it; `few` rows leave its bytes to be all that counts."""
    group, offsets = packed.group, packed.offsets
    counted = packed.codes == torch.uint8 and packed.integers
    whole = group % 16 == 0 or group >= packed.in_features
    block_n, block_k = (32, 64) if not whole else (64, 128) if few else (128, 64)
    if x.dtype == torch.float32:  # which no tensor core multiplies exactly: twice the bytes, and every product in registers
        block_n, block_k = min(block_n, 64), 32
    # The largest power of two that divides a group, for a tile must not touch two.
    block_k = min(block_k, group & -group) if whole and group < packed.in_features else block_k
    form = _COUNTED if counted else _FORMS.get(packed.codes, _TABLE)
    return {
        "FORM": form,
        "OFFSET": _NO_OFFSET if offsets is None else _SHIFT if offsets.dtype == torch.int8 and not packed.block else _ADDED,
        "COUNTS": packed.block > 0,
        "UNIT": FLOAT8_UNIT if packed.codes == torch.float8_e4m3fn else 1.0,
        "WHOLE": whole,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        # What a table says is fetched ahead too, as float32: more of it than smaller GPUs hold.
        "num_stages": 2 if form == _TABLE else 4 if few else 3,
    }


def quantized_linear(x: Tensor, packed: QuantizedRows, bias: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """As the op says; inputs in 8 bits that meet integers are rounded here as everywhere, but multiplied in float32."""
    rows, outputs, inputs, group = x.shape[0], packed.out_features, packed.in_features, packed.group
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not rows or not outputs:
        return out
    if rounded and serves(x, packed):
        return scaled(*narrowed(x), packed, bias)
    if rounded and packed.integers:
        x = in_8_bits(x, group)
    few = rows <= FEW_ROWS
    block_m = 16 if few else up_to_power(rows, 32, 128 if x.dtype != torch.float32 else 32)
    kind = described(packed, x, few)
    block_n, block_k = kind["BLOCK_N"], kind["BLOCK_K"]
    tiles = (triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n))
    parts = max(1, min(PROGRAMS // tiles[1], inputs // LEAST_CUT)) if few else 1
    cut = triton.cdiv(triton.cdiv(inputs, parts), block_k) * block_k
    parts = triton.cdiv(inputs, cut)
    target = out if parts == 1 else torch.empty((parts, rows, outputs), dtype=torch.float32, device=x.device)
    absent = packed.scales  # a pointer that is not followed
    offsets = packed.offsets
    _multiply[tiles[0], tiles[1], parts](
        target, x, packed.panels, packed.scales, absent if offsets is None else offsets, packed.table,
        absent if packed.units is None else packed.units, absent if bias is None else bias,
        rows, outputs, inputs, x.stride(0), packed.panels.stride(0), group, packed.block, cut, packed.first,
        BIAS=bias is not None and parts == 1, BLOCK_M=block_m, num_warps=8 if block_m == 128 else 4, **kind,
    )  # fmt: skip
    if parts > 1:
        block = 1024
        _add_parts[(triton.cdiv(out.numel(), block),)](
            out, target, absent if bias is None else bias, parts, rows, outputs, BIAS=bias is not None, BLOCK=block
        )
    return out
