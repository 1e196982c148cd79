"""AWQ: fields of 4 bits, a scale and a zero for each group (Lin et al. 2023), as AutoAWQ writes them for two kernels."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kvrun.errors import Unsupported
from kvrun.quant.bits import unpack
from kvrun.quant.codes import Codes, grouped, whole_numbers
from kvrun.quant.dense import Dense
from kvrun.quant.format import Axes, LinearFormat
from kvrun.quant.registry import Settings, stored
from kvrun.weights.load import indices
from kvrun.weights.plan import Cut, Role

PER = 8  # fields in an integer
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where column j of eight lies in an integer of the "gemm" layout


class AwqGemm:
    """weight = (field - zero) * scale, fields packed along the outputs."""

    unit = 32

    def __init__(self, group: int | None) -> None:
        """`group` None: one for all inputs."""
        self._group = group

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        return self if "qweight" in held else Dense()

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        return {
            "qweight": Axes(out=1, inp=0, out_per=PER),
            "qzeros": Axes(out=1, inp=None, out_per=PER),
            "scales": Axes(out=1, inp=None),
        }

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        fields, zeros = _in_order(tensors["qweight"]), _in_order(tensors["qzeros"])
        codes = whole_numbers(fields, zeros.to(torch.int16), tensors["scales"].T.contiguous(), 4)
        return grouped(codes, indices(cut.cols, fields) // (self._group or cut.in_features))


class AwqGemv(AwqGemm):
    """The same numbers, fields packed along the inputs, zeros and scales along the groups and padded."""

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        by_output = Axes(out=0, inp=None)
        return {"qweight": Axes(out=0, inp=1, inp_per=PER), "qzeros": by_output, "scales": by_output}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        group = self._group or cut.in_features
        count = -(-cut.in_features // group)
        fields = unpack(tensors["qweight"], 4, 1)
        zeros = unpack(tensors["qzeros"], 4, 1)[:, :count].to(torch.int16)
        return grouped(whole_numbers(fields, zeros, tensors["scales"][:, :count], 4), indices(cut.cols, fields) // group)


def _in_order(packed: Tensor) -> Tensor:
    """[rows, columns / 8] -> [columns, rows]"""
    fields = unpack(packed, 4, 1)
    return fields.unflatten(1, (-1, PER))[..., PLACES].flatten(1).T.contiguous()


@stored("awq")
def _(settings: Settings) -> LinearFormat:
    bits, version = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    group = settings.get("group_size", settings.get("q_group_size", -1))
    group = None if group in (-1, None) else group
    if bits != 4:
        raise Unsupported(f"awq with {bits} bits is not read; the format is defined for 4")
    if version == "gemv":
        return AwqGemv(group)
    if version in ("gemm", "exllama", "ipex", "marlin"):
        return AwqGemm(group)
    raise Unsupported(f"awq weights in the layout {version} are not read; use a checkpoint of version gemm or gemv")
