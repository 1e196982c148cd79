"""Batches of adapters on one linear, from all rows alike to every row its own."""

from collections.abc import Iterator
from itertools import cycle

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.ops import LoraSegments, Segment
from kvrun_kernels.sgmv.op import reference


def cases() -> Iterator[Case]:
    inputs = columns = 2048
    for dtype in (torch.bfloat16, torch.float32):
        for rank in (8, 16, 64):
            for rows, run in ((1, 1), (8, 1), (8, 8), (64, 1), (512, 512)):
                # Enough sets of adapters that none is still in a cache.
                held = max(1, (128 << 20) // (rows // run * rank * (inputs + columns) * dtype.itemsize))
                sets = cycle([_segments(rows, run, rank, inputs, columns, dtype) for _ in range(min(held, 64))])
                x, y = torch.randn(rows, inputs).to(dtype), torch.randn(rows, columns).to(dtype)
                yield Case(
                    f"{str(dtype)[6:]} rank={rank} rows={rows} in runs of {run}",
                    lambda x=x, y=y, sets=sets: ops.lora(y, x, next(sets)),
                    bytes=rows // run * rank * (inputs + columns) * dtype.itemsize,
                    flops=2 * rows * rank * (inputs + columns),
                    beside=lambda x=x, y=y, sets=sets: reference(y, x, next(sets)),
                )


def _segments(rows: int, run: int, rank: int, inputs: int, columns: int, dtype: torch.dtype) -> LoraSegments:
    return LoraSegments(
        Segment(i, i + run, torch.randn(rank, inputs).to(dtype), torch.zeros(rank, columns, dtype=dtype), 0) for i in range(0, rows, run)
    )
