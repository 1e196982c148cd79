"""A token of one and of many sequences, and a prompt."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.selective_scan.op import reference


def cases() -> Iterator[Case]:
    channels, size = 5120, 16
    a, d, dt_bias = -torch.rand(channels, size) - 0.01, torch.randn(channels), torch.randn(channels)
    for sequences, tokens in ((1, 1), (16, 1), (1, 128)):
        rows = sequences * tokens
        x, dt, z = torch.randn(3, rows, channels).to(torch.bfloat16)
        b, c = torch.randn(2, rows, size).to(torch.bfloat16)
        state = torch.zeros(sequences, channels, size)
        starts, slots = torch.arange(sequences + 1, dtype=torch.int32) * tokens, torch.arange(sequences, dtype=torch.int32)
        args = (x, dt, a, b, c, d, dt_bias, starts, slots, torch.zeros(sequences, dtype=torch.bool), state, z)
        yield Case(
            f"bfloat16 {sequences} x {tokens} tokens of {channels} channels, states of {size}",
            lambda args=args: ops.selective_scan(*args),
            bytes=4 * x.nbytes + 2 * state.nbytes + a.nbytes,
            flops=6 * rows * channels * size,
            beside=lambda args=args: reference(*args),
        )
