"""Weights of float8_e4m3fn times inputs of the same, by the library's scaled product: where a processor multiplies 8-bit floats itself."""

import torch
from torch import Tensor

from kvrun_kernels.quantized_linear.rows import QuantizedRows

MOST = torch.finfo(torch.float8_e4m3fn).max
# GPUs from the first up to the last, which PyTorch multiplies for with a scale for each row and each output. So it does on CPUs.
CAPABILITIES = ((8, 9), (11, 0))


def serves(x: Tensor, packed: QuantizedRows) -> bool:
    """Whether `scaled` takes these, on a processor that multiplies such numbers."""
    return packed.narrow == torch.float8_e4m3fn and x.dtype == torch.bfloat16


def in_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row [rows, in] in codes of float8_e4m3fn whose largest magnitude is 448, and what a code of 1 is worth, [rows, 1] float32."""
    most = x.float().abs().amax(1, keepdim=True)
    step = torch.where(most > 0, most / MOST, 1.0)
    return (x.float() / step).to(torch.float8_e4m3fn), step


def scaled(codes: Tensor, step: Tensor, packed: QuantizedRows, bias: Tensor | None = None) -> Tensor:
    """Rows that codes and steps stand for, as of `in_float8`, times the transpose of the weight, plus the bias [out].

    Sums are float32, the result [rows, out] bfloat16.
    """
    weight = packed.panels.view(torch.float8_e4m3fn)[:, : packed.in_features].t()
    added = None if bias is None else bias.to(torch.bfloat16)
    return torch._scaled_mm(codes, weight, scale_a=step, scale_b=packed.scales.float(), bias=added, out_dtype=torch.bfloat16)
