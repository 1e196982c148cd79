"""The residual sum of a token and of a prompt."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case


def cases() -> Iterator[Case]:
    width = 4096
    for rows in (1, 8, 512):
        x, y = torch.zeros(2, rows, width).to(torch.bfloat16)
        yield Case(f"bfloat16 {rows}x{width}", lambda x=x, y=y: ops.add_(x, y), bytes=3 * x.nbytes, beside=lambda x=x, y=y: x.add_(y))
