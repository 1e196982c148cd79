"""GPTQ: fields of 2, 3, 4 or 8 bits packed along the inputs, a scale and a zero for each group, maybe in activation order.

Layout: Frantar et al. 2022 as AutoGPTQ and GPTQModel write it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kvrun.errors import Unsupported
from kvrun.quant.bits import period, unpack
from kvrun.quant.codes import Codes, grouped, whole_numbers
from kvrun.quant.dense import Dense
from kvrun.quant.format import Axes, LinearFormat
from kvrun.quant.registry import Settings, stored
from kvrun.weights.load import indices
from kvrun.weights.plan import Cut, Role

BITS = (2, 3, 4, 8)


class Gptq:
    """weight = (field - zero) * scale of its group; version 1 stores zeros less one."""

    unit = 32

    def __init__(self, bits: int, group: int | None, add: int, has_order: bool = True) -> None:
        """`group` None: one for all inputs. `add`: to a stored zero. `has_order`: g_idx says each input's group."""
        self._bits, self._group, self._add, self._has_order = bits, group, add, has_order

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        if "qweight" not in held:
            return Dense()
        return Gptq(self._bits, self._group, self._add, "g_idx" in held)

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat; scales and zeros of all groups are read, a rank may hold inputs of any."""
        fields, integers = period(self._bits)
        tensors = {
            "qweight": Axes(out=1, inp=0, inp_per=fields, inp_index=integers),
            "qzeros": Axes(out=1, inp=None, out_per=fields, out_index=integers),
            "scales": Axes(out=1, inp=None),
        }
        return {**tensors, "g_idx": Axes(out=None, inp=0)} if self._has_order else tensors

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        fields = unpack(tensors["qweight"], self._bits, 0).T.contiguous()
        most = (1 << self._bits) - 1
        # Added within the field: a zero of 0 was stored as -1 and wraps.
        zeros = (unpack(tensors["qzeros"], self._bits, 1).T.to(torch.int16) + self._add) & most
        codes = whole_numbers(fields, zeros, tensors["scales"].T.contiguous(), self._bits)
        if self._has_order:
            return grouped(codes, tensors["g_idx"].long())
        return grouped(codes, indices(cut.cols, fields) // (self._group or cut.in_features))


@stored("gptq")
def _(settings: Settings) -> LinearFormat:
    bits, group = settings.get("bits"), settings.get("group_size", -1)
    if bits not in BITS:
        raise Unsupported(f"gptq with {bits} bits is not read; read are {', '.join(map(str, BITS))}")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise Unsupported(f"gptq weights in the layout {layout} are not read; use a checkpoint in gptq or gptq_v2")
    return Gptq(bits, None if group in (-1, None) else group, add=int(layout == "gptq"))
