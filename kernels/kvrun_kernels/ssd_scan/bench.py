"""A token of one and of many sequences, and a prompt."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.ssd_scan.op import reference


def cases() -> Iterator[Case]:
    heads, dim, groups, size = 80, 64, 1, 128
    a, d, dt_bias = -torch.rand(heads) - 0.01, torch.randn(heads), torch.randn(heads)
    for sequences, tokens in ((1, 1), (16, 1), (1, 128)):
        rows = sequences * tokens
        x, z = torch.randn(2, rows, heads, dim).to(torch.bfloat16)
        b, c = torch.randn(2, rows, groups, size).to(torch.bfloat16)
        dt, state = torch.randn(rows, heads).to(torch.bfloat16), torch.zeros(sequences, heads, dim, size)
        starts, slots = torch.arange(sequences + 1, dtype=torch.int32) * tokens, torch.arange(sequences, dtype=torch.int32)
        args = (x, dt, a, b, c, d, dt_bias, starts, slots, torch.zeros(sequences, dtype=torch.bool), state, z)
        yield Case(
            f"bfloat16 {sequences} x {tokens} tokens of {heads} heads of {dim}, states of {size}",
            lambda args=args: ops.ssd_scan(*args),
            bytes=3 * x.nbytes + 2 * state.nbytes,
            flops=6 * rows * heads * dim * size,
            beside=lambda args=args: reference(*args),
        )
