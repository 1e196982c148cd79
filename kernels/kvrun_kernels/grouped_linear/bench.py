"""Experts of a mixture: the few of a decode step out of more than any cache holds, and all of them in a prompt."""

from collections.abc import Iterator
from itertools import cycle

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.grouped_linear.op import reference


def cases() -> Iterator[Case]:
    outputs, inputs, experts = 1536, 2048, 32
    grouped = ops.Grouped([ops.pack_linear(torch.randn(outputs, inputs).to(torch.bfloat16)) for _ in range(experts)])
    for active, rows in ((2, 1), (4, 1), (8, 1), (8, 4), (32, 8), (32, 64)):
        calls = []
        for shift in range(0, experts, active):
            chosen = torch.zeros(experts, dtype=torch.int32)
            chosen[shift : shift + active] = rows
            calls.append(torch.cat((torch.zeros(1, dtype=torch.int32), chosen.cumsum(0).to(torch.int32))))
        x = torch.randn(active * rows, inputs).to(torch.bfloat16)
        ours, theirs = cycle(calls), cycle(calls)
        yield Case(
            f"bfloat16 {active} of {experts} experts {outputs}x{inputs}, {rows} rows each",
            lambda x=x, ours=ours: ops.grouped_linear(x, grouped, next(ours)),
            bytes=active * grouped.first.nbytes,
            flops=2 * active * rows * outputs * inputs,
            beside=lambda x=x, theirs=theirs: reference(x, grouped, next(theirs)),
            dtype=torch.bfloat16,
        )
