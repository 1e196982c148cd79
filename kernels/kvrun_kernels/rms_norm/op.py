"""Root-mean-square normalisation of rows."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu

SCHEMA = "rms_norm(Tensor x, Tensor weight, float eps, float offset=0.0) -> Tensor"

_kernel = Kernel("rms_norm", "ppp iiiii ff ii")


def reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (weight.float() + offset)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Scale each row to root mean square 1, then by `weight + offset`, rounding once at the end.

    x [rows, width], or [rows, parts, width] with any strides but the last · weight [width] · out like x, contiguous.
    """
    if x.dim() in (2, 3) and (gpu := _kernel.triton(x, weight)):
        return gpu.rms_norm(x, weight, eps, offset)
    if _kernel.run is None or x.dim() not in (2, 3) or not on_cpu(x, weight):
        return reference(x, weight, eps, offset)
    parts, part_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    out = torch.empty(x.shape, dtype=x.dtype)
    _kernel.run(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), x.shape[0], parts, x.shape[-1], x.stride(0), part_stride, eps, offset,
        DTYPES[x.dtype], DTYPES[weight.dtype],
    )  # fmt: skip
    return out
