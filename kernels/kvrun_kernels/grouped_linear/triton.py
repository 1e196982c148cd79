"""Products of grouped rows on GPUs: a program for some rows of a group and some of its outputs."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.linear.op import PackedLinear
from kvrun_kernels.tiles import TYPES, owner, product, rounded, up_to_power


@triton.jit
def _multiply(
    out, x, weights, biases, offsets, groups, outputs, inputs, x_stride,
    DTYPE: tl.constexpr, BIAS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group, start = owner(offsets, groups, tl.program_id(0), BLOCK_M)
    stop = tl.load(offsets + group + 1)
    if start < stop:
        row, n = start + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mine, held = row < stop, n < outputs
        weight = tl.load(weights + group).to(tl.pointer_type(DTYPE))
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
            total += tl.load(tl.load(biases + group).to(tl.pointer_type(BIAS)) + n, held, other=0.0).to(tl.float32)[None, :]
        target = out + row.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(target, rounded(total, out.dtype.element_ty), mine[:, None] & held[None, :])


@lru_cache(maxsize=4096)
def _pointers(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device, kept: they are a layer's, and a captured graph goes on reading them."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def grouped_linear(x: Tensor, packed: Sequence[PackedLinear], offsets: Tensor, biases: Sequence[Tensor] | None) -> Tensor:
    rows, outputs, inputs = x.shape[0], packed[0].out_features, packed[0].in_features
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not rows or not outputs:
        return out
    weights = _pointers(tuple(p.held.data_ptr() for p in packed), x.device)
    added = weights if biases is None else _pointers(tuple(b.data_ptr() for b in biases), x.device)
    # Rows that a group has if they spread evenly: few of them leave a taller tile empty.
    block_m = up_to_power(rows // len(packed), 16, 64)
    block_n, block_k = (64, 128) if block_m == 16 else (128, 64)
    aligned = inputs * x.element_size() % 16 == 0 and all(p.held.data_ptr() % 16 == 0 for p in packed)
    _multiply[(rows // block_m + len(packed), triton.cdiv(outputs, block_n))](
        out, x, weights, added, offsets, len(packed), outputs, inputs, x.stride(0),
        DTYPE=TYPES[packed[0].dtype], BIAS=None if biases is None else TYPES[biases[0].dtype], ALIGNED=aligned,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
