"""Triton's products of groups over codes against the reference: every form, groups without rows, odd widths."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.quantized_linear.op import in_8_bits
from kvrun_kernels.quantized_linear.test_triton import FORMS, make

WAYS = (*((form, None) for form in FORMS), ("int4", "shift"), ("nf4", "float"), ("int8", "float"))
CASES = (((1,), 9, 120, 24), ((1, 0, 17, 1, 0, 2), 70, 136, 32), ((0, 3), 33, 301, None))


def judged(x, weights, offsets, biases=None):
    biases = biases or [torch.zeros(1)] * len(weights)
    rows = [x[a:b].double() @ w.double().T + bias.double() for a, b, w, bias in zip(offsets, offsets[1:], weights, biases)]
    return torch.cat(rows).to(x.dtype)


@pytest.mark.parametrize("form,offsets", WAYS)
@pytest.mark.parametrize("sizes,outputs,inputs,group", CASES, ids=str)
def test_every_form_and_groups_of_any_size(device, dtype, form, offsets, sizes, outputs, inputs, group, close):
    packed, weights = zip(*(make(form, outputs, inputs, group, offsets, dtype) for _ in sizes))
    biases = [torch.randn(outputs).to(torch.bfloat16) for _ in sizes]
    grouped, bounds = ops.Grouped(packed, biases), torch.tensor([0, *sizes]).cumsum(0)
    assert grouped.table is not None
    x = torch.randn(sum(sizes), inputs + 3).to(dtype)[:, :inputs]
    close(ops.grouped_quantized_linear(x, grouped, bounds), judged(x, weights, bounds, biases), factor=2)


@pytest.mark.parametrize("form", FORMS)
def test_many_rows(device, form, close):
    packed, weights = zip(*(make(form, 150, 96, 32) for _ in range(3)))
    bounds, x = torch.tensor([0, 133, 133, 200], dtype=torch.int32), torch.randn(200, 96).to(torch.bfloat16)
    close(ops.grouped_quantized_linear(x, ops.Grouped(packed), bounds), judged(x, weights, bounds), factor=2)


def test_tables_of_16_that_begin_elsewhere_are_told_apart(device, close):
    """Counted codes from -8 and from -3 are of one form."""
    codes, scales = torch.randint(0, 16, (20, 64), dtype=torch.uint8), torch.full((20, 2), 0.02)
    tables = [torch.arange(16.0) - first for first in (8, 3)]
    packed = [ops.pack_quantized(codes, scales, group=32, table=table) for table in tables]
    bounds, x = torch.tensor([0, 2, 5]), torch.randn(5, 64)
    weights = [table[codes.int()] * 0.02 for table in tables]
    close(ops.grouped_quantized_linear(x, ops.Grouped(packed), bounds), judged(x, weights, bounds), factor=2)


def test_inputs_in_8_bits_codes_of_several_forms_and_no_rows(device, close):
    packed, weights = zip(*(make(form, 40, 96, 32) for form in ("int4", "int4", "int8")))
    bounds, x = torch.tensor([0, 2, 5]), torch.randn(5, 96)
    grouped = ops.Grouped(packed[:2])
    close(ops.grouped_quantized_linear(x, grouped, bounds, rounded=True), judged(in_8_bits(x, 32), weights, bounds), factor=2)
    close(ops.grouped_quantized_linear(x, ops.Grouped(packed[1:]), bounds), judged(x, weights[1:], bounds), factor=2)
    assert ops.grouped_quantized_linear(x[:0], grouped, torch.tensor([0, 0, 0])).shape == (0, 40)
