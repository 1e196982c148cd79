"""Layer norm against its reference."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.layer_norm.op import reference


@pytest.mark.parametrize("rows,width", ((1, 2), (3, 7), (2, 64), (40, 2048), (5, 4100)))
@pytest.mark.parametrize("weighted,biased", ((True, True), (True, False), (False, False)))
def test_shapes_and_dtypes(level, dtype, rows, width, weighted, biased, close):
    x = (3 + 2 * torch.randn(rows, width)).to(dtype)
    weight = torch.randn(width).to(dtype) if weighted else None
    bias = torch.randn(width).to(dtype) if biased else None
    close(ops.layer_norm(x, weight, bias, 1e-5), reference(x, weight, bias, 1e-5), factor=2)


def test_heads_of_a_fused_projection_are_read_in_place(level, dtype, close):
    x = torch.randn(5, 90).to(dtype)[:, 8 : 8 + 4 * 17].unflatten(1, (4, 17))
    found = ops.layer_norm(x, None, None, 1e-5)
    assert torch.equal(found, ops.layer_norm(x.reshape(20, 17), None, None, 1e-5).view(5, 4, 17))
    close(found, reference(x, None, None, 1e-5), factor=2)


def test_a_row_has_the_same_bits_in_every_batch(level, dtype):
    x, weight, bias = torch.randn(70, 1001).to(dtype), torch.randn(1001), torch.randn(1001)
    alone = torch.cat([ops.layer_norm(x[i : i + 1], weight, bias, 1e-5) for i in range(70)])
    assert torch.equal(ops.layer_norm(x, weight, bias, 1e-5), alone)
