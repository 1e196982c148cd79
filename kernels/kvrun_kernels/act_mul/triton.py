"""Activations on GPUs: a program for a piece of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.act_mul.op import ACTS
from kvrun_kernels.tiles import rounded, up_to_power

_SILU, _GELU, _GELU_TANH, _RELU = (tl.constexpr(ACTS[name]) for name in ("silu", "gelu", "gelu_tanh", "relu"))


@triton.jit
def _applied(x, ACT: tl.constexpr):
    if ACT == _SILU:
        found = x * tl.sigmoid(x)
    elif ACT == _GELU:
        found = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == _GELU_TANH:
        # tanh(u) = 2 * sigmoid(2u) - 1
        found = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == _RELU:
        found = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        found = x * tl.sigmoid(1.702 * x)
    return found


@triton.jit
def _activate(out, x, width, x_stride, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = at < width
    found = _applied(tl.load(x + row * x_stride + at, held, other=0.0).to(tl.float32), ACT)
    if GATED:
        found *= tl.load(x + row * x_stride + width + at, held, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, rounded(found, out.dtype.element_ty), held)


def activate(x: Tensor, width: int, act: str, gated: bool) -> Tensor:
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    block = up_to_power(width, 1, 1024)
    if out.numel():
        grid = (x.shape[0], triton.cdiv(width, block))
        _activate[grid](out, x, width, x.stride(0), ACT=ACTS[act], GATED=gated, BLOCK=block, num_warps=4)
    return out
