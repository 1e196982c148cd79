"""Root-mean-square normalisation on GPUs: a program for each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.tiles import rounded, up_to_power


@triton.jit
def _normalise(out, x, weight, width, x_stride, eps, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    held = at < width
    values = tl.load(x + row * x_stride + at, held, other=0.0).to(tl.float32)
    normal = values * tl.rsqrt(tl.sum(values * values) / width + eps)
    scaled = normal * (tl.load(weight + at, held, other=0.0).to(tl.float32) + offset)
    tl.store(out + row * width + at, rounded(scaled, out.dtype.element_ty), held)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = up_to_power(x.shape[1])
    if x.shape[0]:
        _normalise[(x.shape[0],)](
            out, x, weight, x.shape[1], x.stride(0), eps, offset, BLOCK=block, num_warps=up_to_power(block // 512, 1, 16)
        )
    return out
