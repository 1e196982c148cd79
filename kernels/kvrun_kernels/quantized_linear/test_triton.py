"""Triton's product over codes against the weight that they stand for."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.quantized_linear.op import counted, in_8_bits
from kvrun_kernels.quantized_linear.scaled import CAPABILITIES, in_float8, serves
from kvrun_kernels.quantized_linear.test_quantized_linear import counts

NF4 = torch.linspace(-1, 1, 16) ** 3
FORMS = ("int4", "nf4", "int8", "float8")


def make(form: str, outputs: int, inputs: int, group: int | None, offsets: str | None = None, dtype=torch.float32):
    """A weight whose rows have a norm of about 1, and what its codes stand for, computed from them by hand."""
    codes = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8)
    table = None
    if form == "float8":
        codes = torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)
        values = codes.float()
    elif form == "int8":
        codes = codes.view(torch.int8)
        values = codes.float()
    else:
        codes, table = codes & 15, NF4.to(codes.device) if form == "nf4" else None
        values = codes.float() - 8 if table is None else table[codes.int()]
    of_group = torch.arange(inputs) // (group or inputs)
    scales = ((0.5 + torch.rand(outputs, int(of_group[-1]) + 1)) / (values.std() * inputs**0.5)).to(dtype)
    shift = torch.randint(-8, 9, scales.shape, dtype=torch.int8) if offsets == "shift" else None
    added = torch.randn(scales.shape) / inputs**0.5 if offsets == "float" else None
    dense = (values + (0 if shift is None else shift[:, of_group])) * scales.float()[:, of_group]
    dense = dense if added is None else dense + added[:, of_group]
    return ops.pack_quantized(codes, scales, shift if added is None else added, group=group, table=table), dense


def expected(x, dense, bias=None):
    return (x.double() @ dense.double().T + (0 if bias is None else bias.double())).to(x.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs,inputs,group", ((1, 8, 8), (70, 136, 32), (33, 301, None), (65, 200, 64), (9, 120, 24)), ids=str)
def test_every_form_and_group(device, dtype, form, outputs, inputs, group, close):
    packed, dense = make(form, outputs, inputs, group, dtype=dtype)
    bias = torch.randn(outputs).to(dtype)
    x = torch.randn(3, inputs + 3).to(dtype)[:, :inputs]
    close(ops.quantized_linear(x, packed, bias), expected(x, dense, bias), factor=2)


@pytest.mark.parametrize("form,offsets", (("int4", "shift"), ("int8", "shift"), ("nf4", "float"), ("int8", "float")))
@pytest.mark.parametrize("group", (24, 32, None))
def test_offsets_of_groups(device, dtype, form, offsets, group, close):
    packed, dense = make(form, 40, 100, group, offsets)
    x = torch.randn(3, 100).to(dtype)
    close(ops.quantized_linear(x, packed), expected(x, dense), factor=2)


@pytest.mark.parametrize("offsets", (False, True))
@pytest.mark.parametrize("form,inputs,group,block", (("int4", 512, 32, 8), ("int8", 512, 16, 16), ("int4", 96, 24, 4)))
def test_counts_of_units_have_the_bits_of_their_products(device, dtype, form, inputs, group, block, offsets):
    codes = torch.randint(0, 16, (70, inputs), dtype=torch.uint8)
    codes, held = codes if form == "int4" else codes.view(torch.int8), counts(70, inputs // group, block, offsets=offsets)
    short = ops.pack_quantized(codes, **held, group=group)
    long = ops.pack_quantized(codes, *counted(**held, block=block), group=group)
    assert torch.equal(short.dense(), long.dense())
    for rows in (3, 40):
        x = torch.randn(rows, inputs).to(dtype)
        assert torch.equal(ops.quantized_linear(x, short), ops.quantized_linear(x, long))


@pytest.mark.parametrize("rows", (16, 17, 64, 133))
@pytest.mark.parametrize("form", FORMS)
def test_many_rows(device, form, rows, close):
    packed, dense = make(form, 150, 96, 32)
    x = torch.randn(rows, 96).to(torch.bfloat16)
    close(ops.quantized_linear(x, packed), expected(x, dense), factor=2)


@pytest.mark.parametrize("bias", (None, torch.bfloat16), ids=str)
def test_inputs_cut_among_programs(device, dtype, bias, close):
    packed, dense = make("int4", 20, 2100, 128)
    x, bias = torch.randn(2, 2100).to(dtype), None if bias is None else torch.randn(20).to(bias)
    close(ops.quantized_linear(x, packed, bias), expected(x, dense, bias), factor=2)


def test_few_rows_have_the_same_bits_alone_and_together(device, dtype):
    packed, _ = make("int4", 40, 1100, 64)
    x = torch.randn(16, 1100).to(dtype)
    together = ops.quantized_linear(x, packed)
    assert all(torch.equal(ops.quantized_linear(x[i : i + 1], packed), together[i : i + 1]) for i in (0, 7, 15))


@pytest.mark.parametrize("form", ("int4", "int8"))
def test_inputs_in_8_bits_are_rounded_as_everywhere(device, dtype, form, close):
    packed, dense = make(form, 40, 96, 32, "shift")
    x = torch.randn(5, 96).to(dtype)
    found = ops.quantized_linear(x, packed, rounded=True)
    close(found, expected(in_8_bits(x, 32), dense).to(dtype), factor=2)
    assert not torch.equal(found.float(), ops.quantized_linear(x.float(), packed).to(dtype).float())


def need_float8(device):
    first, beyond = CAPABILITIES
    if device == "cuda" and not first <= torch.cuda.get_device_capability() < beyond:
        pytest.skip(f"a GPU of compute capability {first} to {beyond}: not here")


@pytest.mark.parametrize("inputs", (1, 40, 1024, 2500))
def test_rows_become_float8_as_defined(device, dtype, inputs):
    from kvrun_kernels.quantized_linear.triton import narrowed

    x = (torch.randn(5, inputs + 3) * torch.tensor([[1e-30], [1.0], [0.0], [300.0], [1e4]])).to(dtype)[:, :inputs]
    (codes, steps), (theirs, their_steps) = narrowed(x), in_float8(x)
    assert torch.equal(steps, their_steps) and torch.equal(codes.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("rows", (1, 3, 40))
@pytest.mark.parametrize("bias", (None, torch.bfloat16), ids=str)
def test_float8_meets_inputs_of_8_bits_in_the_library_s_product(device, rows, bias, close):
    packed, dense = make("float8", 48, 64, None)
    x, bias = torch.randn(rows, 64).to(torch.bfloat16), None if bias is None else torch.randn(48).to(bias)
    x[0, 5] = 0
    need_float8(device)
    assert serves(x, packed)
    found = ops.quantized_linear(x, packed, bias, rounded=True)
    codes, step = in_float8(x)
    close(found, expected((codes.float() * step).to(torch.float64), dense, bias).to(torch.bfloat16), factor=2)
    exact = expected(x, dense, bias).float()
    assert 0 < ((found.float() - exact).norm() / exact.norm()).item() < 0.04
    # Rows of zeros have no largest magnitude.
    assert torch.equal(ops.quantized_linear(torch.zeros_like(x), packed, rounded=True), torch.zeros_like(found))


def test_float8_that_the_library_does_not_take_stays_exact(device):
    for outputs, inputs, group, dtype in (
        (47, 64, None, "bfloat16"),
        (48, 72, None, "bfloat16"),
        (48, 64, 32, "bfloat16"),
        (48, 64, None, "half"),
    ):
        packed, _ = make("float8", outputs, inputs, group)
        x = torch.randn(3, inputs).to(getattr(torch, dtype))
        assert torch.equal(ops.quantized_linear(x, packed, rounded=True), ops.quantized_linear(x, packed))


@pytest.mark.parametrize("form", FORMS)
def test_codes_come_back_as_what_they_stand_for(device, form):
    packed, dense = make(form, 37, 301, 64, None if form == "float8" else "shift")
    assert torch.equal(packed.dense(), dense)
    assert torch.equal(packed.rows(torch.tensor([36, 0, 5])), dense[[36, 0, 5]])
    assert ops.quantized_linear(torch.empty(0, 301), packed).shape == (0, 37)
