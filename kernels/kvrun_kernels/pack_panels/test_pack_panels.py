"""Rows land in their places in the panels, whichever part of a weight they are, and no other byte changes."""

import pytest
import torch

from kvrun_kernels.pack_panels.op import pack_panels, reference

# Numbers of a row, and the elements that a panel has of them: k numbers each.
NUMBERS = {
    "float32": (torch.float32, 1), "bfloat16 pairs": (torch.bfloat16, 2), "float16": (torch.float16, 1), "int8 pairs": (torch.int8, 2),
    "int8": (torch.int8, 1), "float8 pairs": (torch.float8_e4m3fn, 2),
}  # fmt: skip


def random(shape: tuple[int, ...], dtype: torch.dtype, below: int = 120) -> torch.Tensor:
    return torch.randint(0, below, (*shape, dtype.itemsize), dtype=torch.uint8).flatten(-2).view(dtype)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("first,rows", ((0, 1), (0, 96), (5, 20), (31, 34), (40, 56), (95, 1)))
@pytest.mark.parametrize("inputs,elements", ((7, 7), (64, 70), (131, 131)))
def test_rows_land_in_their_places(level, name, first, rows, inputs, elements):
    dtype, k = NUMBERS[name]
    panels = random((3, -(-elements // k), 32, k), dtype)
    expected, numbers = panels.clone(), random((rows, inputs + 3), dtype)[:, 1 : inputs + 1]  # not contiguous
    pack_panels(panels, numbers, first)
    reference(expected, numbers, first)
    assert torch.equal(panels.view(torch.uint8), expected.view(torch.uint8))
    places = torch.arange(first, first + rows)
    held = panels.view(torch.uint8)[places // 32, :, places % 32].flatten(1)[:, : inputs * dtype.itemsize]
    assert torch.equal(held, numbers.contiguous().view(torch.uint8)), "the reference says where, and it is so"


@pytest.mark.parametrize("first,rows,inputs", ((0, 64, 80), (3, 40, 37), (63, 1, 300)))
def test_codes_of_four_bits_share_bytes(level, first, rows, inputs):
    panels = torch.randint(0, 256, (2, -(-inputs // 8), 32, 4), dtype=torch.uint8)
    expected, codes = panels.clone(), torch.randint(0, 16, (rows, inputs), dtype=torch.uint8)
    pack_panels(panels, codes, first, nibbles=True)
    reference(expected, codes, first, nibbles=True)
    assert torch.equal(panels, expected)


def test_what_has_no_place_is_refused():
    panels = torch.zeros(1, 4, 32, 2)
    for rows, first in ((torch.zeros(33, 8), 0), (torch.zeros(2, 8), 31), (torch.zeros(1, 9), 0), (torch.zeros(1, 8), -1)):
        with pytest.raises(ValueError, match=r"rows within \[32, 8\] asked"):
            pack_panels(panels, rows, first)
