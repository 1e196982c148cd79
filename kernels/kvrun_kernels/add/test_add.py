"""The residual sum against its reference."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.add.op import reference


@pytest.mark.parametrize("rows,width", ((1, 1), (3, 7), (2, 64), (40, 2048), (5, 4100)))
@pytest.mark.parametrize("scale", (1.0, 0.22))
def test_shapes_and_dtypes(level, dtype, rows, width, scale, close):
    x, y = torch.randn(2, rows, width).to(dtype)
    found, expected = x.clone(), x.clone()
    ops.add_(found, y, scale)
    reference(expected, y, scale)
    close(found, expected)


def test_a_narrow_sum_joins_a_wide_one(level, dtype, close):
    x, y = torch.randn(3, 50), torch.randn(3, 50).to(dtype)
    expected = x + y.float()
    ops.add_(x, y)
    close(x, expected)


def test_views_are_changed_in_place(level, close):
    whole, y = torch.zeros(4, 90), torch.randn(4, 33)
    ops.add_(whole[:, 20:53], y)
    close(whole[:, 20:53], y)
    assert not whole[:, :20].any() and not whole[:, 53:].any()


def test_a_row_has_the_same_bits_in_every_batch(level, dtype):
    x, y = torch.randn(2, 70, 1001).to(dtype)
    together = x.clone()
    ops.add_(together, y, 0.3)
    for i in range(70):
        ops.add_(x[i : i + 1], y[i : i + 1], 0.3)
    assert torch.equal(together, x)


def test_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match=r"found \[2, 3\] and \[1, 3\]"):
        ops.add_(torch.zeros(2, 3), torch.zeros(1, 3))
