"""A token of many sequences and a prompt of one."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.causal_conv.op import reference


def cases() -> Iterator[Case]:
    channels, taps = 5120, 4
    weight, bias = torch.randn(channels, taps), torch.randn(channels)
    for sequences, tokens in ((1, 1), (16, 1), (1, 512)):
        x = torch.randn(sequences * tokens, channels).to(torch.bfloat16)
        state = torch.zeros(sequences, channels, taps - 1)
        starts, slots = torch.arange(sequences + 1, dtype=torch.int32) * tokens, torch.arange(sequences, dtype=torch.int32)
        args = (x, weight, bias, starts, slots, torch.zeros(sequences, dtype=torch.bool), state, "silu")
        yield Case(
            f"bfloat16 {sequences} x {tokens} tokens of {channels} channels, {taps} taps",
            lambda args=args: ops.causal_conv(*args),
            bytes=2 * x.nbytes + 2 * state.nbytes + weight.nbytes,
            beside=lambda args=args: reference(*args),
        )
