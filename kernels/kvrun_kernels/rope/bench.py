"""Rotation of a token's heads and of a prompt's."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.rope.op import reference


def cases() -> Iterator[Case]:
    cos, sin = torch.randn(2, 4096, 64)
    for tokens in (1, 8, 512):
        q, k = torch.randn(tokens, 32, 128).to(torch.bfloat16), torch.randn(tokens, 8, 128).to(torch.bfloat16)
        args = (q, k, torch.arange(tokens, dtype=torch.int32), cos, sin)
        yield Case(
            f"bfloat16 {tokens} tokens of 32 + 8 heads of 128",
            lambda args=args: ops.rope_(*args),
            bytes=2 * (q.nbytes + k.nbytes),
            beside=lambda args=args: reference(*args),
        )
