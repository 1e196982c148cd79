"""Root-mean-square norm against its reference."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.rms_norm.op import reference


@pytest.mark.parametrize("rows,width", ((1, 1), (3, 7), (2, 64), (40, 2048), (5, 4100)))
@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_shapes_and_dtypes(level, dtype, rows, width, offset, close):
    x, weight = 5 * torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    close(ops.rms_norm(x, weight, 1e-6, offset), reference(x, weight, 1e-6, offset))


def test_float32_weights_and_strided_rows(level, close):
    x, weight = torch.randn(4, 200).to(torch.bfloat16)[:, :96], torch.randn(96)
    close(ops.rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5))


def test_heads_of_a_fused_projection_are_read_in_place(level, dtype, close):
    fused, weight = torch.randn(5, 90).to(dtype), torch.randn(17)
    x = fused[:, 8 : 8 + 4 * 17].unflatten(1, (4, 17))
    found = ops.rms_norm(x, weight, 1e-5)
    assert torch.equal(found, ops.rms_norm(x.reshape(20, 17), weight, 1e-5).view(5, 4, 17))
    close(found, reference(x, weight, 1e-5))


def test_a_row_has_the_same_bits_in_every_batch(level, dtype):
    x, weight = torch.randn(70, 1001).to(dtype), torch.randn(1001).to(dtype)
    alone = torch.cat([ops.rms_norm(x[i : i + 1], weight, 1e-5) for i in range(70)])
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), alone)
