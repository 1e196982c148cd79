"""Codes and scales are to the bit those of the definition, at every level, whatever the rows, and stand for nearly the weight."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.ops import Scheme
from kvrun_kernels.quantize.op import reference

TABLE = torch.cat((torch.tensor([0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25]), -torch.linspace(0, 1, 8)))  # not in order
SCHEMES = {
    "int8": Scheme(torch.int8, 127),
    "128 steps": Scheme(torch.int8, 128),
    "float8": Scheme(torch.float8_e4m3fn, 448),
    "int4": Scheme(torch.uint8, group=32),
    "int4 in groups of 8": Scheme(torch.uint8, group=8),
    "table": Scheme(torch.uint8, group=64, table=TABLE),
}
# How far a number may be off, of the largest magnitude that it shares a scale with.
ERROR = {"int8": 0.0042, "128 steps": 0.0082, "float8": 0.04, "int4": 0.13, "int4 in groups of 8": 0.13, "table": 0.17}


def same(weight: torch.Tensor, scheme: Scheme) -> None:
    codes, scales = ops.quantize(weight, scheme)
    wanted, beside = reference(weight, scheme)
    assert codes.dtype == wanted.dtype == scheme.codes and scales.dtype == beside.dtype
    assert torch.equal(scales, beside)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows,inputs", ((1, 1), (3, 40), (70, 301), (5, 2048), (0, 8)))
def test_the_bits_of_the_definition(level, dtype, name, rows, inputs):
    weight = (torch.randn(rows, inputs + 5) * torch.exp(3 * torch.randn(rows, 1))).to(dtype)
    same(weight[:, 2 : inputs + 2], SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
def test_the_edges_of_numbers(level, dtype, name):
    largest = torch.finfo(dtype).max
    edges = torch.tensor([0.0, 1.0, -1.0, 0.5, 1.5, -2.5, 1e-30, 2.0**-24, 3e-8, 6e-5, 1e-3, 100.0, 6e4, largest, -largest])
    groups = [(sign * edge * torch.linspace(-1, 1, 64)).roll(turn) for edge in edges for sign in (1, -1) for turn in (0, 7)]
    groups += [torch.zeros(64), torch.full((64,), 3.0), torch.full((64,), -3.0), torch.arange(64.0) / 127, torch.arange(-32.0, 32) / 8]
    same(torch.stack(groups).to(dtype), SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_knows_of_no_other(level, name):
    weight = torch.randn(100, 77)
    codes, scales = ops.quantize(weight, SCHEMES[name])
    for row in (0, 41, 99):
        alone, scale = ops.quantize(weight[row : row + 1], SCHEMES[name])
        assert torch.equal(alone[0].view(torch.uint8), codes[row].view(torch.uint8)) and torch.equal(scale[0], scales[row])


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_stand_for_nearly_the_weight(level, name):
    scheme, weight = SCHEMES[name], torch.randn(40, 192)
    codes, scales = ops.quantize(weight, scheme)
    stand_for = ops.pack_quantized(codes, scales, group=scheme.group, table=scheme.table).dense()
    most = weight.unflatten(1, (-1, scheme.group or 192)).abs().amax(2, keepdim=True)
    off = ((stand_for - weight).unflatten(1, (-1, scheme.group or 192)).abs() / most).max()
    assert 0 < off <= ERROR[name]
