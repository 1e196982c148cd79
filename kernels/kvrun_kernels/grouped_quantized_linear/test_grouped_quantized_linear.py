"""Groups of rows over codes against `quantized_linear` one by one: the same bits, whatever the sizes of the groups."""

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import ops
from kvrun_kernels.grouped_linear.test_grouped_linear import SIZES
from kvrun_kernels.grouped_quantized_linear.op import reference
from kvrun_kernels.quantized_linear.op import in_8_bits
from kvrun_kernels.quantized_linear.test_quantized_linear import FORMS, make
from kvrun_kernels.recording import Arena, Recording, can_replay

MIXED = (1, 0, 133, 2, 0, 13)
WAYS = (
    *((form, "symmetric") for form in FORMS),
    ("int4", "shift"),
    ("int4", "float"),
    ("nf4", "float"),
    ("int8", "shift"),
    ("int8", "counts"),
)


def groups(sizes, form="int4", offsets="symmetric", outputs=40, inputs=77, group=40, dtype=torch.float16, bias=None):
    packed = [make(form, outputs, inputs, group, offsets, dtype) for _ in sizes]
    biases = [torch.randn(outputs).to(bias) for _ in sizes] if bias else None
    return ops.Grouped(packed, biases), torch.tensor([0, *sizes]).cumsum(0)


@pytest.mark.parametrize("form,offsets", WAYS)
@pytest.mark.parametrize("sizes", (*SIZES, MIXED), ids=str)
@pytest.mark.parametrize("bias", (None, torch.bfloat16), ids=str)
def test_the_same_bits_as_quantized_linear_group_by_group(level, dtype, form, offsets, sizes, bias):
    grouped, bounds = groups(sizes, form, offsets, bias=bias)
    assert grouped.table is not None
    x = torch.randn(sum(sizes), 77).to(dtype)
    for rounded in (False, True):
        found = ops.grouped_quantized_linear(x, grouped, bounds.int(), rounded=rounded)
        assert torch.equal(found, reference(x, grouped, bounds, rounded=rounded))


@pytest.mark.parametrize("form,offsets", WAYS)
def test_right_against_what_the_codes_stand_for(level, dtype, form, offsets, close):
    grouped, bounds = groups(MIXED, form, offsets, outputs=171, inputs=301, group=64, bias=dtype)
    x = torch.randn(sum(MIXED), 301).to(dtype)
    for rounded in (False, True):
        held = in_8_bits(x, 64) if rounded and grouped.first.integers else x
        rows = [
            held[start:stop].double() @ p.dense().double().T + bias.double()
            for start, stop, p, bias in zip(bounds, bounds[1:], grouped.packed, grouped.biases)
        ]
        close(ops.grouped_quantized_linear(x, grouped, bounds, rounded=rounded), torch.cat(rows).to(dtype), factor=6)


@pytest.mark.parametrize("rounded", (False, True))
def test_threads_and_strides_never_change_a_result(level, rounded):
    grouped, bounds = groups((1, 2, 0, 30), outputs=500, inputs=300, group=32)
    x = torch.randn(33, 320).to(torch.bfloat16)[:, 9:309]
    threads = kvrun_kernels.get_num_threads()
    found = []
    for count in (1, 2, 5):
        kvrun_kernels.set_num_threads(count)
        found.append(ops.grouped_quantized_linear(x, grouped, bounds, rounded=rounded))
    kvrun_kernels.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], ops.grouped_quantized_linear(x.contiguous(), grouped, bounds, rounded=rounded))


def test_codes_of_several_forms_and_the_reference_level_serve_too(close):
    packed = [make(form, 40, 64, 32) for form in ("int4", "nf4", "int8")]
    mixed, bounds, x = ops.Grouped(packed), torch.tensor([0, 2, 2, 5]), torch.randn(5, 64)
    assert mixed.table is None
    expected = torch.cat((x[:2] @ packed[0].dense().T, x[2:] @ packed[2].dense().T))
    close(ops.grouped_quantized_linear(x, mixed, bounds), expected, factor=3)
    try:
        kvrun_kernels.use("reference")
        close(ops.grouped_quantized_linear(x, mixed, bounds), expected, factor=3)
    finally:
        kvrun_kernels.use("native")


@pytest.mark.skipif(not can_replay(), reason="native.so: not built, or calls cannot be made again here")
def test_a_recording_reads_the_rows_of_each_group_anew(level):
    """Nothing that a call notes may stem from the offsets it found."""
    grouped, bounds = groups((3, 0, 1), bias=torch.float32)
    plain = ops.Grouped([ops.pack_linear(torch.randn(77, 40)) for _ in range(3)])
    x = torch.randn(4, 77)
    with Recording(Arena()) as recorded:
        found = ops.grouped_linear(ops.grouped_quantized_linear(x, grouped, bounds), plain, bounds)
    assert recorded.whole
    for sizes in ((0, 4, 0), (1, 1, 2), (3, 0, 1)):
        x.copy_(torch.randn(4, 77))
        bounds.copy_(torch.tensor([0, *sizes]).cumsum(0))
        recorded.replay()
        assert torch.equal(found, ops.grouped_linear(ops.grouped_quantized_linear(x, grouped, bounds), plain, bounds))


def test_no_rows_and_what_does_not_fit():
    grouped, _ = groups((1, 1))
    assert ops.grouped_quantized_linear(torch.empty(0, 77), grouped, torch.tensor([0, 0, 0])).shape == (0, 40)
    with pytest.raises(ValueError, match=r"\[rows, 77\] asked, found \[2, 7\]"):
        ops.grouped_quantized_linear(torch.zeros(2, 7), grouped, torch.tensor([0, 1, 2]))
    for wrong in ([0, 1], [0, 1, 1], [0, 3, 2], [1, 1, 2]):
        with pytest.raises(ValueError, match="3 rising offsets from 0 to 2 asked"):
            ops.grouped_quantized_linear(torch.zeros(2, 77), grouped, torch.tensor(wrong))
