"""bitsandbytes: int8 with a scale for each output, or a table of 16 with a scale for each block (Dettmers et al. 2023)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvrun.errors import FilesError
from kvrun.quant.codes import Codes, grouped
from kvrun.quant.dense import PLAIN, Dense
from kvrun.quant.format import WHOLE, Axes, Flat, LinearFormat
from kvrun.quant.made import INT8, Made, by_table
from kvrun.quant.registry import Settings, made, stored
from kvrun.weights.load import indices
from kvrun.weights.plan import Cut, Role

STATE = "weight.quant_state.bitsandbytes__"
BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# One bit of sign, two of exponent, one of mantissa, in the order that the library's own bits count.
FP4 = (0.0, 0.0052083334, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25)


class Int8:
    """weight = code * scale / 127. Columns that the library would leave to float16 are quantized as the others."""

    unit = 32

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        return self if "SCB" in held else Dense()

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        return {"weight": PLAIN, "SCB": Axes(out=0, inp=None), "weight_format": WHOLE}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        if tensors["weight_format"].item() != 0:
            raise FilesError(f"{cut.module}: its weight is not in row order; save the model again with a current bitsandbytes")
        return Codes(tensors["weight"], tensors["SCB"].float().unsqueeze(1) / 127)


class Table4:
    """weight = table[code] * scale of its block; blocks follow each other over the whole matrix, and so do their scales."""

    unit = BLOCK

    def __init__(self, state: str = "", nested: bool = False) -> None:
        """`state`: the suffix of the tensor that holds the settings; `nested`: scales are codes themselves."""
        self._state, self._nested = state, nested

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        state = next((name for name in held if name.startswith(STATE)), None)
        return Dense() if state is None else Table4(state, "weight.nested_absmax" in held)

    def tensors(self) -> Mapping[str, Axes | Flat]:
        """See LinearFormat."""
        scales = ("weight.absmax", "weight.quant_map", self._state)
        nested = ("weight.nested_absmax", "weight.nested_quant_map") if self._nested else ()
        return {"weight": Flat(), **dict.fromkeys((*scales, *nested), WHOLE)}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        state = json.loads(bytes(tensors[self._state].tolist()))
        packed, block = tensors["weight"].view(torch.uint8), int(state["blocksize"])
        rows, columns = indices(cut.rows, packed), indices(cut.cols, packed)
        pairs = packed.reshape(len(rows), -1)
        values = torch.stack((pairs >> 4, pairs & 15), dim=2).flatten(1)
        # The longest run of inputs that lies in one block whichever output it belongs to.
        group = math.gcd(cut.in_features, block)
        firsts = torch.arange(0, cut.in_features, group)
        scales = self._scales(tensors, state)[(rows.unsqueeze(1) * cut.in_features + firsts) // block]
        codes = Codes(values if len(columns) == cut.in_features else values[:, columns].contiguous(), scales)
        return replace(grouped(codes, columns // group), table=tensors["weight.quant_map"])

    def _scales(self, tensors: Mapping[str, Tensor], state: Mapping[str, float]) -> Tensor:
        if not self._nested:
            return tensors["weight.absmax"].float()
        outer = tensors["weight.nested_absmax"].repeat_interleave(int(state["nested_blocksize"]))
        codes = tensors["weight.absmax"].long()
        return tensors["weight.nested_quant_map"][codes] * outer[: len(codes)] + state["nested_offset"]


@stored("bitsandbytes")
def _(settings: Settings) -> LinearFormat:
    return Int8() if settings.get("load_in_8bit") else Table4()


@made("bitsandbytes")
def _() -> LinearFormat:
    return Made(INT8)


@made("bitsandbytes-nf4")
def _() -> LinearFormat:
    return Made(by_table(torch.tensor(NF4), BLOCK))


@made("bitsandbytes-fp4")
def _() -> LinearFormat:
    table = torch.tensor(FP4)
    return Made(by_table(torch.cat((table, -table)), BLOCK))
