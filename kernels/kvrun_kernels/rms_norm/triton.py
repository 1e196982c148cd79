"""Root-mean-square normalisation on GPUs: a program for each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrun_kernels.tiles import rounded, up_to_power


@triton.jit
def _normalise(out, x, weight, width, parts, x_stride, part_stride, eps, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    held = at < width
    values = tl.load(x + row // parts * x_stride + row % parts * part_stride + at, held, other=0.0).to(tl.float32)
    normal = values * tl.rsqrt(tl.sum(values * values) / width + eps)
    scaled = normal * (tl.load(weight + at, held, other=0.0).to(tl.float32) + offset)
    tl.store(out + row * width + at, rounded(scaled, out.dtype.element_ty), held)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, parts = x.shape[:-1].numel(), x.shape[1] if x.dim() == 3 else 1
    block = up_to_power(x.shape[-1])
    if rows:
        _normalise[(rows,)](
            out, x, weight, x.shape[-1], parts, x.stride(0), x.stride(-2), eps, offset,
            BLOCK=block, num_warps=up_to_power(block // 512, 1, 16),
        )  # fmt: skip
    return out
