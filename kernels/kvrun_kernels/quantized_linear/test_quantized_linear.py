"""The product over codes: right for every form, shape and dtype, and the same bits for a row in every batch."""

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import ops
from kvrun_kernels.ops import PackedQuantized
from kvrun_kernels.quantized_linear.op import counted, in_8_bits

SHAPES = ((1, 8, 8), (33, 77, 40), (515, 1031, 64), (40, 1700, None))
NF4 = torch.sort(torch.randn(16)).values


def int4(outputs: int, inputs: int) -> dict:
    return {"codes": torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)}


def int8(outputs: int, inputs: int) -> dict:
    return {"codes": torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)}


def float8(outputs: int, inputs: int) -> dict:
    codes = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8)
    codes[codes & 127 == 127] = 0  # not a number
    return {"codes": codes.view(torch.float8_e4m3fn)}


def nf4(outputs: int, inputs: int) -> dict:
    return {**int4(outputs, inputs), "table": NF4}


FORMS = {"int4": int4, "int8": int8, "float8": float8, "nf4": nf4}
OFFSETS = {
    "symmetric": lambda scales: None,
    "shift": lambda scales: torch.randint(-8, 9, scales.shape, dtype=torch.int8),
    "float": lambda scales: torch.randn(scales.shape) * scales.float(),
}


def counts(outputs: int, groups: int, block: int, size: float = 1.0, offsets: bool = True) -> dict:
    """Scales of about 1 / size, and offsets, as integers that count units, one for `block` groups."""
    units = (0.5 + torch.rand(outputs, groups // block * (2 if offsets else 1))) / (32 * size)
    scales = torch.randint(-64, 64, (outputs, groups), dtype=torch.int8)
    return {"scales": scales, "offsets": -scales.roll(1, 0) if offsets else None, "units": units.half()}


def make(form: str, outputs: int, inputs: int, group: int | None, offsets: str = "symmetric", dtype=torch.float32) -> PackedQuantized:
    arguments = FORMS[form](outputs, inputs)
    size = arguments.get("table", arguments["codes"]).float().square().mean().sqrt() * inputs**0.5
    groups = 1 if group is None else -(-inputs // group)
    if offsets == "counts":
        return ops.pack_quantized(**arguments, group=group, **counts(outputs, groups, 1, size))
    scales = ((0.5 + torch.rand(outputs, groups)) / size).to(dtype)
    return ops.pack_quantized(**arguments, scales=scales, offsets=OFFSETS[offsets](scales), group=group)


@pytest.mark.parametrize("outputs,inputs,group", SHAPES)
@pytest.mark.parametrize(
    "form,offsets",
    (
        *((form, "symmetric") for form in FORMS),
        ("int4", "shift"),
        ("nf4", "float"),
        ("int8", "float"),
        ("int4", "counts"),
        ("int8", "counts"),
    ),
)
def test_every_form_shape_and_dtype(level, dtype, form, outputs, inputs, group, offsets, close):
    packed = make(form, outputs, inputs, group, offsets, dtype)
    bias = torch.randn(outputs).to(dtype)
    dense = packed.dense().double()
    for rows in (1, 2, 5, 13, 40):
        x = torch.randn(rows, inputs).to(dtype)
        close(ops.quantized_linear(x, packed, bias), (x.double() @ dense.T + bias.double()).to(dtype), factor=4)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_in_every_batch(level, dtype, form):
    offsets = "symmetric" if form == "float8" else "shift"
    packed, x = make(form, 171, 1101, 96, offsets), torch.randn(70, 1101).to(dtype)
    bias = torch.randn(171)
    alone = torch.cat([ops.quantized_linear(x[i : i + 1], packed, bias) for i in range(70)])
    for rows in range(1, 71):
        assert torch.equal(ops.quantized_linear(x[:rows], packed, bias), alone[:rows]), rows


@pytest.mark.parametrize("form", FORMS)
def test_long_prompts_are_cut_without_a_trace(level, form):
    packed, x = make(form, 64, 130, 64), torch.randn(1700, 130)
    alone = torch.cat([ops.quantized_linear(x[i : i + 1], packed) for i in range(0, 1700, 53)])
    assert torch.equal(ops.quantized_linear(x, packed)[::53], alone)


@pytest.mark.parametrize("outputs,inputs,group", SHAPES)
@pytest.mark.parametrize(
    "form,offsets", (("int4", "symmetric"), ("int4", "shift"), ("int4", "float"), ("int8", "symmetric"), ("int8", "shift"))
)
def test_inputs_in_8_bits_are_rounded_once_and_no_more(level, dtype, form, outputs, inputs, group, offsets, close):
    packed = make(form, outputs, inputs, group, offsets, dtype)
    bias = torch.randn(outputs).to(dtype)
    x = torch.randn(40, inputs).to(dtype)
    left = in_8_bits(x, packed.group)
    assert ((left - x.float()).norm() / x.float().norm()).item() < 0.01
    expected = (left.double() @ packed.dense().double().T + bias.double()).to(dtype)
    found = ops.quantized_linear(x, packed, bias, rounded=True)
    close(found, expected, factor=6)
    for rows in (1, 2, 3, 5, 13):
        assert torch.equal(ops.quantized_linear(x[:rows], packed, bias, rounded=True), found[:rows]), rows


@pytest.mark.parametrize("form", ("float8", "nf4"))
def test_inputs_stay_exact_where_codes_are_no_integers(level, form):
    packed, x = make(form, 40, 96, 32), torch.randn(3, 96)
    assert torch.equal(ops.quantized_linear(x, packed, rounded=True), ops.quantized_linear(x, packed))


def test_threads_never_change_a_result(level):
    packed, x = make("int4", 2000, 300, 32), torch.randn(30, 300)
    threads = kvrun_kernels.get_num_threads()
    found = []
    for count in (1, 2, 5):
        kvrun_kernels.set_num_threads(count)
        found.append(ops.quantized_linear(x, packed))
    kvrun_kernels.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("form", FORMS)
def test_codes_come_back_as_what_they_stand_for(level, form):
    arguments = FORMS[form](70, 300)
    scales, shifts = torch.rand(70, 5), torch.randint(-8, 9, (70, 5), dtype=torch.int8)
    shifts = None if form == "float8" else shifts
    packed = ops.pack_quantized(**arguments, scales=scales, offsets=shifts, group=64)
    codes = arguments["codes"]
    values = arguments.get("table", torch.arange(-8.0, 8.0))[codes.int()] if codes.dtype == torch.uint8 else codes.float()
    group = torch.arange(300) // 64
    expected = (values if shifts is None else values + shifts[:, group]) * scales[:, group]
    assert torch.equal(packed.dense(), expected)
    ids = torch.tensor([69, 0, 31, 32, 0])
    assert torch.equal(packed.rows(ids), expected[ids])


@pytest.mark.parametrize("form", FORMS)
def test_native_and_reference_pack_alike(form):
    arguments, scales = FORMS[form](70, 301), torch.rand(70, 1)
    native = ops.pack_quantized(**arguments, scales=scales)
    try:
        kvrun_kernels.use("reference")
        plain = ops.pack_quantized(**arguments, scales=scales)
        assert torch.equal(native.panels, plain.panels) and torch.equal(native.scales, plain.scales)
        assert torch.equal(ops.quantized_linear(torch.eye(301), plain), plain.dense().T)
    finally:
        kvrun_kernels.use("native")


def test_a_long_group_repeats_its_scale():
    codes, scales = int8(4, 3000)["codes"], torch.rand(4, 2)
    packed = ops.pack_quantized(codes, scales, group=1536)
    assert packed.group == 512
    assert torch.equal(packed.dense(), codes * scales[:, torch.arange(3000) // 1536])


@pytest.mark.parametrize("offsets", (False, True))
@pytest.mark.parametrize("inputs,group,block", ((512, 32, 8), (512, 16, 16), (96, 16, 2), (3072, 1536, 2)))
@pytest.mark.parametrize("form", ("int4", "int8"))
def test_counts_of_units_have_the_bits_of_their_products(level, dtype, form, inputs, group, block, offsets):
    codes, held = FORMS[form](70, inputs)["codes"], counts(70, inputs // group, block, offsets=offsets)
    scales, added = counted(**held, block=block)
    spread = held["units"].float().unflatten(1, (-1, 2 if offsets else 1)).repeat_interleave(block, 1)
    assert torch.equal(scales, held["scales"] * spread[..., 0]) and (not offsets or torch.equal(added, held["offsets"] * spread[..., 1]))
    short = ops.pack_quantized(codes, **held, group=group)
    long = ops.pack_quantized(codes, scales, added, group=group)
    assert torch.equal(short.dense(), long.dense()) and torch.equal(short.rows(torch.tensor([69, 0])), long.rows(torch.tensor([69, 0])))
    assert short.nbytes < long.nbytes or group > 512
    for rows in (1, 3, 8, 40):
        x = torch.randn(rows, inputs).to(dtype)
        for rounded in (False, True):
            assert torch.equal(ops.quantized_linear(x, short, rounded=rounded), ops.quantized_linear(x, long, rounded=rounded))


def test_what_does_not_fit_is_refused():
    packed = make("int4", 8, 16, 8)
    assert ops.quantized_linear(torch.empty(0, 16), packed).shape == (0, 8)
    with pytest.raises(ValueError, match=r"\[rows, 16\] asked, found \[2, 7\]"):
        ops.quantized_linear(torch.randn(2, 7), packed)
    with pytest.raises(ValueError, match="multiple of 8 inputs asked, found 12"):
        ops.pack_quantized(**int4(8, 24), scales=torch.ones(8, 2), group=12)
    with pytest.raises(ValueError, match=r"shape \[8, 3\] asked, found \[8, 2\]; one for each 8"):
        ops.pack_quantized(**int4(8, 24), scales=torch.ones(8, 2), group=8)
    with pytest.raises(ValueError, match="come without offsets"):
        ops.pack_quantized(**float8(8, 24), scales=torch.ones(8, 1), offsets=torch.ones(8, 1))
    with pytest.raises(ValueError, match=r"int8 counts of float16 units asked, each for 1, 2, 4, 8 or so groups, found torch\.int8"):
        ops.pack_quantized(**int4(8, 24), **counts(8, 3, 3), group=8)
    with pytest.raises(ValueError, match="int8 counts of float16 units asked"):
        ops.pack_quantized(**int4(8, 24), **{**counts(8, 3, 3), "units": torch.ones(8, 4).half()}, group=8)
    with pytest.raises(ValueError, match=r"found torch\.int32"):
        ops.pack_quantized(torch.zeros(8, 8, dtype=torch.int32), torch.ones(8, 1))
