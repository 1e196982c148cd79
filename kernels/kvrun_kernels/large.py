"""Memory for what is read much at every step: weights side by side in pages of 2 MiB, which the processor finds without walking tables.

A tensor's own allocation begins and ends within such pages, so that most of a small weight would lie in pages of 4 KiB.
"""

import math
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

PAGE = 2 << 20
LINE = 64  # tensors begin at cache lines
CHUNK = 64 << 20  # bytes asked of the system at a time; what stays untouched of them costs nothing
STRETCH = 16 << 20  # bytes of a file that one of THREADS reads at a time
THREADS = 8

_chunk = torch.empty(0, dtype=torch.uint8)


def large(bytes_: int) -> Tensor:
    """Memory of its own for this many bytes, in large pages where the system has them. -> [bytes] uint8, zeros"""
    # Private: shared memory has large pages only where the system was told so.
    memory = mmap.mmap(-1, bytes_ + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return whole[begin : begin + bytes_]


def mapped(file: Path) -> Tensor:
    """The bytes of a file as the system holds them, in large pages where it can, read by several threads. -> [bytes] uint8

    They take no memory beside that of the file, and nobody may change the file: write another one in its place.
    """
    with file.open("rb") as source:
        # A copy of a page would be made only if somebody wrote to it.
        memory = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    with ThreadPoolExecutor(THREADS) as pool:
        # A look at every page brings it in, and several looks at once keep the disk busy.
        list(pool.map(lambda part: part[:: mmap.PAGESIZE].sum(), whole.split(STRETCH)))
    return whole


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor beside those that were asked for before; the memory goes back when all of its neighbours are gone."""
    global _chunk
    size = math.prod(shape) * dtype.itemsize
    taken = -(-size // LINE) * LINE
    if taken > len(_chunk):
        _chunk = large(max(taken, CHUNK))
    found, _chunk = _chunk[:size], _chunk[taken:]
    return found.view(dtype).view(tuple(shape))


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`empty`, which is zeros because no memory is handed out twice; what is never written of it takes none."""
    return empty(shape, dtype)
