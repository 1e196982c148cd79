"""Formats made of plain weights while they are loaded; the kernels' `quantize` has the arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from kvrun_kernels import ops
from kvrun_kernels.ops import Scheme
from torch import Tensor

from kvrun.quant.codes import Codes
from kvrun.quant.dense import PLAIN, Dense
from kvrun.quant.format import Axes, LinearFormat
from kvrun.quant.registry import made
from kvrun.weights.plan import Cut, Role

GROUP = 32  # inputs that share a scale in kv.run's own 4-bit form
INT8, EETQ = Scheme(torch.int8, 127), Scheme(torch.int8, 128)
FLOAT8 = Scheme(torch.float8_e4m3fn, int(torch.finfo(torch.float8_e4m3fn).max))


def int4(group: int = GROUP) -> Scheme:
    """Integers from -8 to 7 with a float16 scale for each group."""
    return Scheme(torch.uint8, group=group)


def by_table(table: Tensor, group: int) -> Scheme:
    """The nearest of 16 entries between -1 and 1, of the group's largest magnitude."""
    return Scheme(torch.uint8, group=group, table=table)


class Made:
    """Plain weights that become codes after they were cut. The embedding and what every rank holds in full (routers) stay plain."""

    def __init__(self, scheme: Scheme, head: LinearFormat | None = None) -> None:
        """`head` None: the output matrix stays plain."""
        self._scheme, self.unit, self._head = scheme, scheme.group or GROUP, head or Dense()

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        if role == "head":
            return self._head
        return Dense() if role in ("whole", "embedding") else self

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        return {"weight": PLAIN}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        return encoded(tensors["weight"], self._scheme)


def encoded(weight: Tensor, scheme: Scheme) -> Codes:
    """Codes of a weight [out, in] of any type."""
    values, scales = ops.quantize(weight, scheme)
    return Codes(values, scales, group=scheme.group, table=scheme.table)


def int8_head() -> LinearFormat:
    """The output matrix of kv.run's own formats. Without it, a step of int4 would read as much of a plain head as of several layers."""
    return Made(INT8)


@made("int8")
def _() -> LinearFormat:
    return Made(INT8, int8_head())


@made("int4")
def _() -> LinearFormat:
    return Made(int4(), int8_head())


@made("eetq")
def _() -> LinearFormat:
    return Made(EETQ)


@made("fp8")
def _() -> LinearFormat:
    return Made(FLOAT8)
