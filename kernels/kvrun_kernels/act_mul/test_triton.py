"""Triton's activations against the reference: odd widths, strides, alone and as gates."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.act_mul.op import ACTS, act_mul_reference, activation_reference


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows,width", ((0, 8), (5, 18), (1, 2500)))
def test_rows_of_any_width(device, dtype, act, rows, width, close):
    x = 3 * torch.randn(rows, 2 * width + 3).to(dtype)[:, : 2 * width]
    close(ops.activation(x, act), activation_reference(x, act), factor=2)
    close(ops.act_mul(x, act), act_mul_reference(x, act), factor=2)
