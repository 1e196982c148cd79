"""What the ops that carry a state through a sequence ask of their tensors, beside shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrun_kernels.dispatch import on_cpu


def in_order(tables: Sequence[Tensor], fresh: Tensor) -> bool:
    """Whether compiled code reads what is no row of tokens as it lies: float32 without gaps, `fresh` a bool for each sequence."""
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in tables) and fresh.dtype == torch.bool


def native_reads(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, z: Tensor | None, tables: Sequence[Tensor], query_start: Tensor, slots: Tensor
) -> bool:
    """Whether native code takes a scan's tensors, whose tables are in order: it reads b and c as one dtype, and x and z as one."""
    alike = b.dtype == c.dtype and (z is None or z.dtype == x.dtype) and query_start.dtype == slots.dtype == torch.int32
    return alike and on_cpu(x, dt, b, c, z, *tables)
