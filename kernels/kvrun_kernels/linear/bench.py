"""Decode to prefill over weights that no cache holds."""

from collections.abc import Iterator
from itertools import cycle

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case


def cases() -> Iterator[Case]:
    outputs, inputs, copies = 5632, 2048, 8
    for dtype in (torch.bfloat16, torch.float32):
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
        packed = [ops.pack_linear(w) for w in weights]
        for rows in (1, 2, 4, 8, 12, 16, 32, 64, 128, 512):
            x = torch.randn(rows, inputs).to(dtype)
            ours, theirs = cycle(packed), cycle(weights)
            yield Case(
                f"{str(dtype)[6:]} {outputs}x{inputs} rows={rows}",
                lambda x=x, ours=ours: ops.linear(x, next(ours)),
                bytes=packed[0].nbytes,
                flops=2 * rows * outputs * inputs,
                beside=lambda x=x, theirs=theirs: torch.nn.functional.linear(x, next(theirs)),
                dtype=dtype,
            )
