"""Groups of rows against `linear` one by one: the same bits, whatever the sizes of the groups."""

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import ops
from kvrun_kernels.grouped_linear.op import reference

SIZES = ((1,), (0, 1, 0), (1, 0, 1, 1, 0, 2), (13, 0, 5, 40), (0, 1, 0, 800))


def groups(sizes, outputs, inputs, dtype, bias_dtype=None):
    weights = [(torch.randn(outputs, inputs) / inputs**0.5).to(dtype) for _ in sizes]
    biases = [torch.randn(outputs).to(bias_dtype) for _ in sizes] if bias_dtype else None
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return weights, ops.Grouped([ops.pack_linear(w) for w in weights], biases), offsets


@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bias", (None, torch.bfloat16), ids=str)
def test_the_same_bits_as_linear_group_by_group(level, dtype, weight_dtype, sizes, bias):
    outputs, inputs = (40, 33) if sum(sizes) > 100 else (171, 301)
    _, grouped, offsets = groups(sizes, outputs, inputs, weight_dtype, bias)
    assert grouped.table is not None
    x = torch.randn(sum(sizes), inputs).to(dtype)
    for counted in (offsets, offsets.long()):
        assert torch.equal(ops.grouped_linear(x, grouped, counted), reference(x, grouped, offsets))


def test_right_against_the_plain_product(level, dtype, close):
    weights, grouped, offsets = groups((3, 0, 20, 1), 100, 256, dtype, dtype)
    x = torch.randn(24, 256).to(dtype)
    rows = [x[a:b].double() @ w.double().T + v.double() for a, b, w, v in zip(offsets, offsets[1:], weights, grouped.biases)]
    close(ops.grouped_linear(x, grouped, offsets), torch.cat(rows).to(dtype))


def test_threads_and_strides_never_change_a_result(level):
    _, grouped, offsets = groups((1, 2, 0, 30), 500, 300, torch.bfloat16)
    x = torch.randn(33, 320).to(torch.bfloat16)[:, 9:309]
    threads = kvrun_kernels.get_num_threads()
    found = []
    for count in (1, 2, 5):
        kvrun_kernels.set_num_threads(count)
        found.append(ops.grouped_linear(x, grouped, offsets))
    kvrun_kernels.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], ops.grouped_linear(x.contiguous(), grouped, offsets))


def test_weights_of_several_dtypes_and_the_reference_level_serve_too(close):
    weights, grouped, offsets = groups((3, 4), 40, 60, torch.float32)
    x = torch.randn(7, 60)
    expected = torch.cat((x[:3] @ weights[0].T, x[3:] @ weights[1].to(torch.bfloat16).float().T))
    mixed = ops.Grouped([grouped.packed[0], ops.pack_linear(weights[1].to(torch.bfloat16))])
    assert mixed.table is None
    close(ops.grouped_linear(x, mixed, offsets), expected, factor=3)
    try:
        kvrun_kernels.use("reference")
        close(ops.grouped_linear(x, grouped, offsets), torch.cat((x[:3] @ weights[0].T, x[3:] @ weights[1].T)), factor=3)
    finally:
        kvrun_kernels.use("native")


def test_no_rows_and_wrong_offsets():
    _, grouped, _ = groups((1, 1), 8, 6, torch.float32)
    assert ops.grouped_linear(torch.empty(0, 6), grouped, torch.tensor([0, 0, 0])).shape == (0, 8)
    with pytest.raises(ValueError, match=r"\[rows, 6\] asked, found \[2, 7\]"):
        ops.grouped_linear(torch.zeros(2, 7), grouped, torch.tensor([0, 1, 2]))
    for wrong in ([0, 1], [0, 1, 1], [0, 3, 2], [1, 1, 2]):
        with pytest.raises(ValueError, match="3 rising offsets from 0 to 2 asked"):
            ops.grouped_linear(torch.zeros(2, 6), grouped, torch.tensor(wrong))
