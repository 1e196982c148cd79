"""Triton's products of groups against the reference: groups without rows, odd widths, weights and biases of other dtypes."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.grouped_linear.op import reference


@pytest.mark.parametrize("sizes", ((1,), (0, 1, 0), (1, 0, 17, 1, 0, 2), (0, 100, 0, 33)), ids=str)
@pytest.mark.parametrize("weight_dtype,bias", ((None, None), (torch.bfloat16, torch.float32)), ids=str)
def test_groups_of_any_size(device, dtype, sizes, weight_dtype, bias, close):
    outputs, inputs = 70, 45
    packed = [ops.pack_linear((torch.randn(outputs, inputs) / inputs**0.5).to(weight_dtype or dtype)) for _ in sizes]
    biases = None if bias is None else [torch.randn(outputs).to(bias) for _ in sizes]
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    grouped = ops.Grouped(packed, biases)
    assert grouped.table is not None
    x = torch.randn(sum(sizes), inputs + 3).to(dtype)[:, 2 : 2 + inputs]
    close(ops.grouped_linear(x, grouped, offsets), reference(x, grouped, offsets), factor=2)


def test_weights_of_several_dtypes_and_no_rows(device, close):
    packed = [ops.pack_linear(torch.randn(8, 16)), ops.pack_linear(torch.randn(8, 16).bfloat16())]
    x, offsets = torch.randn(3, 16), torch.tensor([0, 1, 3])
    grouped = ops.Grouped(packed)
    close(ops.grouped_linear(x, grouped, offsets), reference(x, grouped, offsets))
    assert ops.grouped_linear(x[:0], ops.Grouped(packed[:1]), torch.tensor([0, 0])).shape == (0, 8)
