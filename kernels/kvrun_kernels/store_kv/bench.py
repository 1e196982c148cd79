"""Storing a token's keys and values and a prompt's."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.store_kv.op import reference


def cases() -> Iterator[Case]:
    for tokens in (1, 8, 512):
        k, v = torch.randn(2, tokens, 8, 128).to(torch.bfloat16)
        pool = torch.zeros(64, 2, 8, 16, 128, dtype=torch.bfloat16)
        args = (k, v, pool, torch.arange(tokens, dtype=torch.int32))
        yield Case(
            f"bfloat16 {tokens} tokens of 8 heads of 128",
            lambda args=args: ops.store_kv(*args),
            bytes=4 * k.nbytes,
            beside=lambda args=args: reference(*args),
        )
