"""Formats made of plain weights while they are loaded, and the arithmetic that makes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from kvrun.quant.codes import Codes, joined
from kvrun.quant.dense import PLAIN, Dense
from kvrun.quant.format import Axes, LinearFormat
from kvrun.quant.registry import made
from kvrun.weights.plan import Cut, Role

GROUP = 32  # inputs that share a scale in kv.run's own 4-bit form
INT8 = 127  # steps to the largest magnitude
AT_ONCE = 1 << 17  # numbers that are made codes of at a time: copies of them in float32 stay in a cache
SMALLEST = 1e-12  # a row of zeros keeps a scale that can be divided by


class Made:
    """Plain weights that become codes after they were cut. The embedding and what every rank holds in full (routers) stay plain."""

    def __init__(self, encode: Callable[[Tensor], Codes], unit: int = GROUP, head: LinearFormat | None = None) -> None:
        """`encode` takes a weight [out, in] float32, `unit` of whose inputs may share a scale; `head` None: the head stays plain."""
        self._encode, self.unit, self._head = encode, unit, head or Dense()

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
        return encoded(tensors["weight"], self._encode)


def encoded(weight: Tensor, encode: Callable[[Tensor], Codes]) -> Codes:
    """Codes of a weight [out, in] of any type, made of few rows at a time: each has scales of its own."""
    return joined([encode(rows.float()) for rows in weight.split(max(1, AT_ONCE // weight.shape[1]))])


def per_output(weight: Tensor, levels: int) -> Codes:
    """int8 with one scale for each output: its largest magnitude is `levels` steps."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / levels
    return Codes((weight / scale).round().clamp(-128, 127).to(torch.int8), scale)


def int4(weight: Tensor, group: int = GROUP) -> Codes:
    """Integers from -8 to 7 with a float16 scale for each group: its largest number is exactly -8 steps."""
    blocks = _blocks(weight, group)
    most, least = blocks.amax(2, keepdim=True), blocks.amin(2, keepdim=True)
    largest = torch.where(most > -least, most, least)
    scale = (largest / -8).half()
    step = torch.where(scale == 0, 1, scale).float()
    codes = (blocks / step).round().clamp(-8, 7).add(8).to(torch.uint8)
    return Codes(_rows(codes, weight), scale.squeeze(2), group=group)


def by_table(weight: Tensor, table: Tensor, group: int) -> Codes:
    """The nearest of 16 entries between -1 and 1, of the group's largest magnitude."""
    blocks = _blocks(weight, group)
    largest = blocks.abs().amax(2, keepdim=True)
    entries, places = table.sort()
    middles = (entries[1:] + entries[:-1]) / 2
    unit = blocks / torch.where(largest == 0, 1, largest)
    codes = places[torch.bucketize(unit, middles)].to(torch.uint8)
    return Codes(_rows(codes, weight), largest.squeeze(2), group=group, table=table)


def float8(weight: Tensor) -> Codes:
    """e4m3fn with one scale for each output, whose largest magnitude is the type's."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / torch.finfo(torch.float8_e4m3fn).max
    return Codes((weight / scale).to(torch.float8_e4m3fn), scale)


def _blocks(weight: Tensor, group: int) -> Tensor:
    """[out, in] -> [out, groups, group], zeros after the last input."""
    short = -weight.shape[1] % group
    return torch.nn.functional.pad(weight, (0, short)).unflatten(1, (-1, group))


def _rows(blocks: Tensor, weight: Tensor) -> Tensor:
    return blocks.flatten(1)[:, : weight.shape[1]].contiguous()


def int8_head() -> LinearFormat:
    """The output matrix of kv.run's own formats. Without it, a step of int4 would read as much of a plain head as of several layers."""
    return Made(partial(per_output, levels=INT8))


@made("int8")
def _() -> LinearFormat:
    return Made(partial(per_output, levels=INT8), head=int8_head())


@made("int4")
def _() -> LinearFormat:
    return Made(int4, head=int8_head())


@made("eetq")
def _() -> LinearFormat:
    return Made(partial(per_output, levels=128))


@made("fp8")
def _() -> LinearFormat:
    return Made(float8)
