"""Weights of float8_e4m3fn times inputs of the same, by the library's scaled product: where a processor multiplies 8-bit floats itself."""

import torch
from torch import Tensor

from kvrun_kernels.quantized_linear.rows import QuantizedRows

MOST = torch.finfo(torch.float8_e4m3fn).max
SIDE = 16  # inputs and outputs are a multiple of it, or the library refuses
CAPABILITY = (9, 0)  # from which GPUs take a scale for each row and each output; PyTorch computes the same on CPUs


def serves(x: Tensor, packed: QuantizedRows) -> bool:
    """Whether `scaled` takes these: bfloat16 inputs, a scale for each output, and a processor that multiplies such numbers."""
    fits = packed.in_features % SIDE == packed.out_features % SIDE == 0 and len(packed.scales) == 1
    able = x.is_cpu or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= CAPABILITY)
    return packed.codes == torch.float8_e4m3fn and x.dtype == torch.bfloat16 and fits and able


def in_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row [rows, in] in codes of float8_e4m3fn whose largest magnitude is 448, and what a code of 1 is worth, [rows, 1] float32."""
    most = x.float().abs().amax(1, keepdim=True)
    step = torch.where(most > 0, most / MOST, 1.0)
    return (x.float() / step).to(torch.float8_e4m3fn), step


def scaled(x: Tensor, packed: QuantizedRows, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] in 8 bits times the transpose of the weight, plus the bias [out]; sums are float32, the result bfloat16."""
    codes, step = in_float8(x)
    weight = packed.panels.view(torch.float8_e4m3fn)[:, : packed.in_features].t()
    added = None if bias is None else bias.to(x.dtype)
    return torch._scaled_mm(codes, weight, scale_a=step, scale_b=packed.scales.float(), bias=added, out_dtype=x.dtype)
