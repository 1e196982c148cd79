"""The packed product: right for every shape and dtype, and the same bits for a row in every batch."""

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import ops

SHAPES = ((1, 1), (32, 2), (33, 77), (100, 256), (515, 1031))


@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("outputs,inputs", SHAPES)
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
def test_every_shape_and_dtype(level, dtype, weight_dtype, outputs, inputs, bias, close):
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(weight_dtype)
    b = torch.randn(outputs).to(weight_dtype) if bias else None
    packed = ops.pack_linear(weight)
    for rows in (1, 2, 5, 13, 40):
        x = torch.randn(rows, inputs).to(dtype)
        expected = x.double() @ weight.double().T
        close(ops.linear(x, packed, b), (expected if b is None else expected + b.double()).to(dtype))


@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_row_has_the_same_bits_in_every_batch(level, dtype, weight_dtype):
    weight, bias = torch.randn(171, 1101).to(weight_dtype), torch.randn(171)
    packed, x = ops.pack_linear(weight), torch.randn(70, 1101).to(dtype)
    alone = torch.cat([ops.linear(x[i : i + 1], packed, bias) for i in range(70)])
    for rows in range(1, 71):
        assert torch.equal(ops.linear(x[:rows], packed, bias), alone[:rows]), rows


def test_long_prompts_are_cut_without_a_trace(level):
    packed, x = ops.pack_linear(torch.randn(64, 130)), torch.randn(1700, 130)
    alone = torch.cat([ops.linear(x[i : i + 1], packed) for i in range(0, 1700, 53)])
    assert torch.equal(ops.linear(x, packed)[::53], alone)


def test_threads_never_change_a_result(level):
    packed, x = ops.pack_linear(torch.randn(2000, 300)), torch.randn(30, 300)
    threads = kvrun_kernels.get_num_threads()
    found = []
    for count in (1, 2, 5):
        kvrun_kernels.set_num_threads(count)
        found.append(ops.linear(x, packed))
    kvrun_kernels.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_rows_may_have_strides(level, close):
    x, weight = torch.randn(4, 90)[:, 3:53], torch.randn(10, 50)
    close(ops.linear(x, ops.pack_linear(weight)), x @ weight.T, factor=3)


def test_weights_come_back_as_they_went_in(dtype):
    weight = torch.randn(70, 33).to(dtype)
    packed = ops.pack_linear(weight)
    assert torch.equal(packed.dense(), weight)
    ids = torch.tensor([69, 0, 31, 32, 0])
    assert torch.equal(packed.rows(ids), weight[ids])
    assert packed.dtype == dtype and (packed.out_features, packed.in_features) == (70, 33)


def test_views_of_a_fused_weight_can_be_packed():
    fused = torch.randn(40, 60)
    assert torch.equal(ops.pack_linear(fused[:, 10:31]).dense(), fused[:, 10:31])


def test_what_was_packed_natively_serves_the_reference_too(close):
    weight, x = torch.randn(40, 60), torch.randn(3, 60)
    packed = ops.pack_linear(weight)
    try:
        kvrun_kernels.use("reference")
        close(ops.linear(x, packed), x @ weight.T, factor=3)
        close(ops.linear(x, ops.pack_linear(weight)), x @ weight.T, factor=3)
    finally:
        kvrun_kernels.use("native")


def test_no_rows_and_wrong_widths():
    packed = ops.pack_linear(torch.randn(8, 6))
    assert ops.linear(torch.empty(0, 6), packed).shape == (0, 8)
    with pytest.raises(ValueError, match=r"\[rows, 6\] asked, found \[2, 7\]"):
        ops.linear(torch.randn(2, 7), packed)
