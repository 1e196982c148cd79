"""Tensors that share large pages: apart, aligned, and gone when nobody holds them."""

import mmap
import weakref
from pathlib import Path

import pytest
import torch

from kvrun_kernels import large


def test_neighbours_do_not_overlap():
    shapes = [(3, 5), (1,), (0, 4), (257,), (2, 2, 2)]
    made = [large.empty(shape, torch.float32) for shape in shapes]
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert all((tensor == number).all() and tuple(tensor.shape) == shape for number, (tensor, shape) in enumerate(zip(made, shapes)))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32))
def test_every_tensor_begins_at_a_cache_line(dtype):
    assert all(large.empty((n,), dtype).data_ptr() % large.LINE == 0 for n in (1, 33, 4097))


def test_more_than_a_chunk_gets_memory_of_its_own():
    big = large.empty((large.CHUNK + 1,), torch.uint8)
    assert big.numel() == large.CHUNK + 1 and big.data_ptr() % large.PAGE == 0
    assert int(big[-1]) == 0


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_zeros_take_memory_when_they_are_written():
    before, size = resident(), 256 << 20
    made = large.zeros((size,), torch.uint8)
    assert resident() - before < size // 8
    assert not made.any()
    made[:: mmap.PAGESIZE] = 1
    assert resident() - before > size // 2


def test_memory_goes_back_when_the_last_tensor_in_it_is_gone():
    first, second = large.empty((large.CHUNK,), torch.uint8), None
    second = large.empty((8,), torch.float32)
    seen = weakref.ref(first.untyped_storage())
    storage = first.untyped_storage().data_ptr()
    assert second.untyped_storage().data_ptr() != storage
    del first
    assert seen() is None
