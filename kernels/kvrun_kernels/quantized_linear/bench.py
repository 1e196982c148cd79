"""Decode to prefill over codes that no cache holds, beside the same weight in bfloat16."""

from collections.abc import Iterator
from itertools import cycle

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import STEP, Case

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
HELD = 192 << 20  # bytes of weights to go round, beyond any cache


def cases() -> Iterator[Case]:
    for outputs, inputs in SHAPES:
        codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        nibbles = codes.view(torch.uint8) & 15
        scales = {group: torch.full((outputs, -(-inputs // group)), 0.01).half() for group in (32, 128)}
        counts, units = torch.full((outputs, inputs // 32), 5, dtype=torch.int8), torch.full((outputs, inputs // 128), 0.002).half()
        forms = {
            "int8": lambda codes=codes, outputs=outputs: ops.pack_quantized(codes, torch.full((outputs, 1), 0.01)),
            "int4 group 32": lambda nibbles=nibbles, scales=scales[32]: ops.pack_quantized(nibbles, scales, group=32),
            "int4 group 128": lambda nibbles=nibbles, scales=scales[128]: ops.pack_quantized(nibbles, scales, group=128),
            "Q4_K": lambda nibbles=nibbles, counts=counts, units=units: ops.pack_quantized(nibbles, counts, counts, group=32, units=units),
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
    yield from _steps()


def _steps() -> Iterator[Case]:
    most = torch.randint(-128, 128, (max(outputs for outputs, _ in STEP), max(inputs for _, inputs in STEP)), dtype=torch.int8)
    for name, group, rounded in (("int8", None, False), ("int8", None, True), *(("int4", g, r) for g in (32, 128) for r in (False, True))):
        step = []
        for outputs, inputs in STEP:
            codes = most[:outputs, :inputs] if group is None else most[:outputs, :inputs].view(torch.uint8) & 15
            scales = torch.full((outputs, 1), 0.01) if group is None else torch.full((outputs, inputs // group), 0.01).half()
            step.append(ops.pack_quantized(codes, scales, group=group))
        for rows in (1, 8, 16, 32):
            x = torch.randn(rows, most.shape[1]).bfloat16()
            yield Case(
                f"{name}{f' group {group}' if group else ''}{', inputs of 8 bits' if rounded else ''}, all of a step, rows={rows}",
                lambda x=x, step=step, rounded=rounded: [ops.quantized_linear(x[:, : p.in_features], p, rounded=rounded) for p in step],
                bytes=sum(packed.nbytes for packed in step),
                flops=2 * rows * sum(outputs * inputs for outputs, inputs in STEP),
                dtype=torch.bfloat16,
            )


def _copies(make):
    first = make()
    return [first, *(make() for _ in range(HELD // first.nbytes))]
