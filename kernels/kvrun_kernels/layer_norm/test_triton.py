"""Triton's norm against the reference: odd widths, strides, with and without weight and bias."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.layer_norm.op import reference


@pytest.mark.parametrize("rows,width", ((0, 8), (1, 1), (3, 17), (7, 40), (2, 4096)))
def test_rows_of_any_width(device, dtype, rows, width, close):
    x, weight, bias = 3 + torch.randn(rows, width + 3).to(dtype)[:, :width], torch.randn(width), torch.randn(width).to(dtype)
    for given in ((weight, bias), (weight, None), (None, bias), (None, None)):
        close(ops.layer_norm(x, *given, 1e-5), reference(x, *given, 1e-5), factor=2)
