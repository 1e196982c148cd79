"""Gated activation of a token and of a prompt."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.act_mul.op import act_mul_reference
from kvrun_kernels.bench import Case


def cases() -> Iterator[Case]:
    for act in ("silu", "gelu_tanh"):
        for rows in (1, 8, 512):
            x = torch.randn(rows, 2 * 11008).to(torch.bfloat16)
            yield Case(
                f"bfloat16 {act} {rows}x{11008}",
                lambda x=x, act=act: ops.act_mul(x, act),
                bytes=1.5 * x.nbytes,
                beside=lambda x=x, act=act: act_mul_reference(x, act),
            )
