"""Triton's norm against the reference: odd widths, strides, none and many rows."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.rms_norm.op import reference


@pytest.mark.parametrize("rows,width", ((0, 8), (1, 1), (3, 17), (7, 40), (2, 4096)))
def test_rows_of_any_width(device, dtype, rows, width, close):
    x, weight = torch.randn(rows, width + 3).to(dtype)[:, :width], torch.randn(width)
    for offset in (0.0, 1.0):
        close(ops.rms_norm(x, weight, 1e-5, offset), reference(x, weight, 1e-5, offset))


def test_heads_of_a_fused_projection(device, dtype, close):
    x, weight = torch.randn(3, 70).to(dtype)[:, 5 : 5 + 4 * 9].unflatten(1, (4, 9)), torch.randn(9)
    close(ops.rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5))
