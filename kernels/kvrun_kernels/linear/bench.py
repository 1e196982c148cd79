"""Decode to prefill over weights that no cache holds."""

from collections.abc import Iterator
from itertools import cycle

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import STEP, Case


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
    most = torch.randn(max(outputs for outputs, _ in STEP), max(inputs for _, inputs in STEP)).bfloat16()
    step = [ops.pack_linear(most[:outputs, :inputs]) for outputs, inputs in STEP]
    for rows in (1, 8, 16, 32):
        x = torch.randn(rows, most.shape[1]).bfloat16()
        yield Case(
            f"bfloat16, all of a step, rows={rows}",
            lambda x=x: [ops.linear(x[:, : packed.in_features], packed) for packed in step],
            bytes=sum(packed.nbytes for packed in step),
            flops=2 * rows * sum(outputs * inputs for outputs, inputs in STEP),
            dtype=torch.bfloat16,
        )
