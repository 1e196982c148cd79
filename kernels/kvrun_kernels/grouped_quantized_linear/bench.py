"""Quantized experts of a mixture: the few of a decode step out of more than any cache holds, and all of them in a prompt."""

from collections.abc import Callable, Iterator
from itertools import cycle

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.grouped_quantized_linear.op import reference

OUTPUTS, INPUTS, EXPERTS = 1536, 2048, 64


def forms() -> dict[str, Callable[[], ops.PackedQuantized]]:
    """A weight in each of the forms that experts are published in."""
    codes = torch.randint(-128, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    nibbles, floats = codes.view(torch.uint8) & 15, (codes.view(torch.uint8) & 0x7E).view(torch.float8_e4m3fn)
    scales = torch.full((OUTPUTS, INPUTS // 32), 0.01)
    table = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
    return {
        "int4 group 128": lambda: ops.pack_quantized(nibbles, scales[:, ::4].half(), group=128),
        "mxfp4": lambda: ops.pack_quantized(nibbles, scales.bfloat16(), group=32, table=torch.cat((table, -table))),
        "int8": lambda: ops.pack_quantized(codes, scales[:, :1]),
        "float8": lambda: ops.pack_quantized(floats, scales[:, :1]),
    }


def cases() -> Iterator[Case]:
    for name, make in forms().items():
        grouped = ops.Grouped([make() for _ in range(EXPERTS)])
        for active, rows in ((2, 1), (8, 1), (8, 4), (64, 8), (64, 64)):
            calls = []
            for shift in range(0, EXPERTS, active):
                chosen = torch.zeros(EXPERTS, dtype=torch.int64)
                chosen[shift : shift + active] = rows
                calls.append(torch.cat((torch.zeros(1, dtype=torch.int64), chosen.cumsum(0))))
            x = torch.randn(active * rows, INPUTS).to(torch.bfloat16)
            ours, theirs = cycle(calls), cycle(calls)
            yield Case(
                f"{name} {active} of {EXPERTS} experts {OUTPUTS}x{INPUTS}, {rows} rows each",
                lambda x=x, ours=ours, grouped=grouped: ops.grouped_quantized_linear(x, grouped, next(ours)),
                bytes=active * grouped.first.nbytes,
                flops=2 * active * rows * OUTPUTS * INPUTS,
                beside=lambda x=x, theirs=theirs, grouped=grouped: reference(x, grouped, next(theirs)),
                dtype=torch.bfloat16,
            )
