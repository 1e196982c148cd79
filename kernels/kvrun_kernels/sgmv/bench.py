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
    yield from _steps()


def _steps() -> Iterator[Case]:
    """Eight rows of eight adapters on every linear of a step but the head: [inputs, outputs of its parts]."""
    linears = ((2048, (2048, 256, 256)), (2048, (2048,)), (2048, (5632, 5632)), (5632, (2048,))) * 22
    for ranks in ((16,) * 8, (8, 16, 32, 64) * 2):
        step = []
        for inputs, parts in linears:
            segments = []
            for row, rank in enumerate(ranks):
                for n, columns in enumerate(parts):
                    a, bt = torch.randn(rank, inputs).bfloat16(), torch.zeros(rank, columns, dtype=torch.bfloat16)
                    segments.append(Segment(row, row + 1, a, bt, sum(parts[:n])))
            step.append((torch.zeros(8, sum(parts), dtype=torch.bfloat16), torch.randn(8, inputs).bfloat16(), LoraSegments(segments)))
        parameters = sum(ranks) * sum(inputs + columns for inputs, parts in linears for columns in parts)
        yield Case(
            f"bfloat16, all of a step, 8 rows of {'ranks 8 to 64' if len(set(ranks)) > 1 else f'rank {ranks[0]}'}",
            lambda step=step: [ops.lora(y, x, segments) for y, x, segments in step],
            bytes=2 * parameters,
            flops=2 * parameters,
        )


def _segments(rows: int, run: int, rank: int, inputs: int, columns: int, dtype: torch.dtype) -> LoraSegments:
    return LoraSegments(
        Segment(i, i + run, torch.randn(rank, inputs).to(dtype), torch.zeros(rank, columns, dtype=dtype), 0) for i in range(0, rows, run)
    )
