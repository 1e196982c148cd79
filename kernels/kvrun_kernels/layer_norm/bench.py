"""Layer norm of a token and of a prompt."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case


def cases() -> Iterator[Case]:
    width = 4096
    weight = torch.randn(width).to(torch.bfloat16)
    for rows in (1, 8, 512):
        x = torch.randn(rows, width).to(torch.bfloat16)
        yield Case(
            f"bfloat16 {rows}x{width}",
            lambda x=x: ops.layer_norm(x, weight, weight, 1e-5),
            bytes=2 * x.nbytes,
            beside=lambda x=x: torch.nn.functional.layer_norm(x, (width,), weight, weight, 1e-5),
        )
