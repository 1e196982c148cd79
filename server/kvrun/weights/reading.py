"""Parts of files as tensors, read by several threads into memory that is there already.

Nothing is mapped: pages of a mapped file are memory of this process for as long as they are looked at.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

CHUNK = 4 << 20  # bytes read at a time: what was read is still in a cache when it is packed
THREADS = 4  # keep a disk busy; from memory, two already read as fast as it goes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt

T = TypeVar("T")


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Within it, what is larger than 1 MiB goes back to the system when it is freed; else a heap as large as the weights stays."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        # Where the library would have arrived by itself: activations are not to be asked of the system anew each time.
        library.mallopt(MMAP_THRESHOLD, 32 << 20)
        library.mallopt(TRIM_THRESHOLD, 64 << 20)


def fill(descriptor: int, start: int, into: memoryview) -> None:
    """Read bytes from `start` of a file until `into` is full. OSError if the file ends before."""
    at = 0
    while at < len(into):
        count = os.preadv(descriptor, [into[at:]], start + at)
        if count == 0:
            raise OSError(f"the file ends {len(into) - at} bytes before what was to be read")
        at += count


class FileTensor:
    """A tensor in a file, from whose parts other tensors are filled."""

    def __init__(self, file: FileIO, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """The tensor's bytes begin at `start`; the file stays open for as long as this is held."""
        self._file, self._start, self._shape, self._dtype = file, start, shape, dtype

    def copy(self, chosen: tuple[slice, ...], out: Tensor) -> None:
        """Write the part of these ranges, one for each dimension, into `out`, converting to its dtype."""
        import torch

        start, shape = self._start, self._shape
        while chosen and chosen[0].stop - chosen[0].start == 1:
            start += chosen[0].start * math.prod(shape[1:]) * self._dtype.itemsize
            chosen, shape, out = chosen[1:], shape[1:], out[0]
        first, others = (chosen[0].start, chosen[1:]) if chosen else (0, ())
        row = math.prod(shape[1:]) * self._dtype.itemsize
        start += first * row
        whole = all(part.stop - part.start == length for part, length in zip(others, shape[1:], strict=True))
        if whole and out.dtype == self._dtype and out.is_contiguous() and out.device == torch.device("cpu"):
            fill(self._file.fileno(), start, _bytes(out))
            return
        rows, ranges = out if chosen else out.unsqueeze(0), (slice(None), *others)
        step = max(1, CHUNK // max(row, 1))
        buffer = torch.empty(min(step, len(rows)) * row, dtype=torch.uint8, device="cpu")
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            read = buffer[: len(part) * row]
            fill(self._file.fileno(), start + at * row, _bytes(read))
            part.copy_(read.view(self._dtype).view(len(part), *shape[1:])[ranges])


class Ahead(Generic[T]):
    """Does what is asked in turn, the next few at the same time as what came before is worked on."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        self._places: dict[int, Tensor] = {}

    def read(self, asked: Sequence[T], work: Callable[[T, int], Tensor]) -> Iterator[Tensor]:
        """What `work` makes of each, in order. Its second argument is one of few places, used again when the next is asked for."""
        places = THREADS + 1
        coming: list[Future[Tensor]] = []
        for number in range(len(asked) + places - 1):
            if number < len(asked):
                coming.append(self._pool.submit(work, asked[number], number % places))
            if number >= places - 1:
                yield coming[number - places + 1].result()

    def place(self, number: int, size: int) -> Tensor:
        """Bytes that are kept for a place. -> [size] uint8"""
        import torch

        if number not in self._places or len(self._places[number]) < size:
            self._places[number] = torch.empty(max(size, CHUNK), dtype=torch.uint8, device="cpu")
        return self._places[number][:size]

    def close(self) -> None:
        """End the threads and let go of the memory."""
        self._pool.shutdown(cancel_futures=True)
        self._places.clear()


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
