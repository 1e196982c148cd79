"""One long sequence, many short ones, and prompts; over keys and values, over latents, and over pools of every format."""

from collections.abc import Iterator

import torch

from kvrun_kernels import large, ops
from kvrun_kernels.bench import Case
from kvrun_kernels.paged_attention.op import reference
from kvrun_kernels.stored import FORMATS, narrow


def held(pool: torch.Tensor) -> torch.Tensor:
    """A pool as a server holds it, in large pages: in small ones the processor would look up where each of its pages lies."""
    return large.empty(pool.shape, pool.dtype).copy_(pool)


def cases() -> Iterator[Case]:
    for q_heads, kv_heads, dim, value_dim in ((32, 4, 64, 64), (32, 8, 128, 128), (16, 16, 128, 128), (16, 1, 576, 512)):
        planes = 2 if dim == value_dim else 1
        for tokens, context, sequences in ((1, 16384, 1), (1, 1024, 16), (1, 256, 64), (512, 512, 1), (128, 4096, 1)):
            pages = context // 16
            pool = held(torch.randn(sequences * pages, planes, kv_heads, 16, dim).to(torch.bfloat16))
            table = torch.randperm(sequences * pages).to(torch.int32).view(sequences, pages)
            q = torch.randn(sequences * tokens, q_heads, dim).to(torch.bfloat16)
            args = (
                q, pool, torch.arange(sequences + 1, dtype=torch.int32) * tokens,
                torch.full((sequences,), context, dtype=torch.int32), table, dim**-0.5,
            )  # fmt: skip
            seen = tokens * context - tokens * (tokens - 1) / 2
            yield Case(
                f"{q_heads}/{kv_heads} heads of {dim}, {sequences} x {tokens} at {context}",
                lambda args=args, n=value_dim: ops.paged_attention(*args, value_dim=n),
                bytes=pool.nbytes,
                flops=2 * sequences * seen * q_heads * (dim + value_dim),
                beside=lambda args=args, n=value_dim: reference(*args, value_dim=n),
            )
    q, one = torch.randn(1, 32, 128).to(torch.bfloat16), torch.tensor([0, 1], dtype=torch.int32)
    for format in FORMATS:
        pool = held(narrow(torch.randn(1024, 2, 8, 16, 128), format))
        args = (q, pool, one, one[1:] * 16384, torch.randperm(1024).to(torch.int32).view(1, -1), 128**-0.5)
        name = str(format).removeprefix("torch.")
        yield Case(f"{name}, 32/8 heads of 128, 1 x 1 at 16384", lambda args=args: ops.paged_attention(*args), bytes=pool.nbytes)
