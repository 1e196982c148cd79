"""Decode to prefill over codes that no cache holds, beside the same weight in bfloat16."""

from collections.abc import Iterator
from itertools import cycle

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
HELD = 192 << 20  # bytes of weights to go round, beyond any cache


def cases() -> Iterator[Case]:
    for outputs, inputs in SHAPES:
        codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        nibbles = codes.view(torch.uint8) & 15
        scales = {group: torch.full((outputs, -(-inputs // group)), 0.01).half() for group in (32, 128)}
        forms = {
            "int8": lambda codes=codes, outputs=outputs: ops.pack_quantized(codes, torch.full((outputs, 1), 0.01)),
            "int4 group 32": lambda nibbles=nibbles, scales=scales[32]: ops.pack_quantized(nibbles, scales, group=32),
            "int4 group 128": lambda nibbles=nibbles, scales=scales[128]: ops.pack_quantized(nibbles, scales, group=128),
        }
        dense = _copies(lambda codes=codes: ops.pack_linear(codes.bfloat16()))
        for name, make in forms.items():
            packed = _copies(make)
            for rows in (1, 4, 8, 16, 512):
                x = torch.randn(rows, inputs).bfloat16()
                ours, theirs = cycle(packed), cycle(dense)
                yield Case(
                    f"{name} {outputs}x{inputs} rows={rows}",
                    lambda x=x, ours=ours: ops.quantized_linear(x, next(ours)),
                    bytes=packed[0].nbytes,
                    flops=2 * rows * outputs * inputs,
                    beside=lambda x=x, theirs=theirs: ops.linear(x, next(theirs)),
                    dtype=torch.bfloat16,
                )


def _copies(make):
    first = make()
    return [first, *(make() for _ in range(HELD // first.nbytes))]
