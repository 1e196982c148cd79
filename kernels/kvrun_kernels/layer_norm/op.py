"""Layer normalisation of rows."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu

SCHEMA = "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor"

_kernel = Kernel("layer_norm", "pppp iiiii f ii")


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float()

    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], wide(weight), wide(bias), eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Shift each row to mean 0 and scale it to variance 1, then apply weight and bias, where given.

    x [rows, width], or [rows, parts, width] with any strides but the last · weight, bias [width], of one dtype · out like x, contiguous.
    """
    if x.dim() in (2, 3) and (gpu := _kernel.triton(x, weight, bias)):
        return gpu.layer_norm(x, weight, bias, eps)
    one_dtype = weight is None or bias is None or weight.dtype == bias.dtype
    if _kernel.run is None or x.dim() not in (2, 3) or not one_dtype or not on_cpu(x, weight, bias):
        return reference(x, weight, bias, eps)
    parts, part_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    out = torch.empty(x.shape, dtype=x.dtype)
    given = weight if weight is not None else bias
    _kernel.run(
        out.data_ptr(), x.data_ptr(), None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(), x.shape[0], parts, x.shape[-1], x.stride(0), part_stride, eps,
        DTYPES[x.dtype], 0 if given is None else DTYPES[given.dtype],
    )  # fmt: skip
    return out
