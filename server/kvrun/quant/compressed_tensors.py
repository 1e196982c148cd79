"""compressed-tensors: integers packed along the inputs, plain int8, or floats of 8 or 4 bits, by groups of modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from kvrun.errors import Unsupported
from kvrun.quant.bits import period, unpack
from kvrun.quant.codes import Codes, grouped, shifted, whole_numbers
from kvrun.quant.dense import PLAIN, Dense
from kvrun.quant.format import WHOLE, Axes, LinearFormat
from kvrun.quant.fp8 import Float8
from kvrun.quant.mxfp4 import POSITIVE
from kvrun.quant.registry import Settings, choose, stored
from kvrun.weights.held import HEAD
from kvrun.weights.load import indices
from kvrun.weights.plan import Cut, Role

LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized")
BY_OUTPUT = Axes(out=0, inp=None)
NVFP4_GROUP = 16


class CompressedTensors:
    """Each module by the scheme of the first group that names it; one without a scale is plain."""

    unit = 32

    def __init__(self, schemes: list[tuple[list[str], Mapping[str, Any]]], head: LinearFormat) -> None:
        """`schemes`: targets of a group and how it stores weights; `head`: what becomes of a plain output matrix."""
        self._schemes, self._head = schemes, head

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        if "weight_scale" not in held:
            return self._head if role == "head" else Dense()
        scheme = self._scheme(module)
        if "weight_global_scale" in held:
            return NvFp4(held)
        if "weight_packed" in held:
            return Packed(scheme, held)
        if scheme.get("type") == "float":
            block = scheme.get("block_structure")
            return Float8(tuple(block) if block else None).of(module, role, held)
        return Int8(held)

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat; asked of a module's own format."""
        raise TypeError("each module has a format of its own")

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes | Tensor:
        """See LinearFormat; asked of a module's own format."""
        raise TypeError("each module has a format of its own")

    def _scheme(self, module: str) -> Mapping[str, Any]:
        for targets, scheme in self._schemes:
            if any(target == "Linear" or _names(target, module) for target in targets):
                return scheme
        raise Unsupported(f"{module} has a scale and no group of quantization_config names it; config and weights do not belong together")


class Packed:
    """weight = (field - zero) * scale; fields and zeros count from the smallest integer."""

    unit = 32

    def __init__(self, scheme: Mapping[str, Any], held: Collection[str]) -> None:
        """`scheme`: the group's `weights`; `held`: suffixes."""
        self._bits, self._group = int(scheme["num_bits"]), scheme.get("group_size")
        self._asymmetric, self._ordered = "weight_zero_point" in held, "weight_g_idx" in held
        if self._bits not in (4, 8):
            raise Unsupported(f"pack-quantized with {self._bits} bits is not read; read are 4 and 8")
        self._others = [name for name in held if name in ("weight_shape", "input_scale")]

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        return self

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        fields, _ = period(self._bits)
        tensors = {"weight_packed": Axes(out=0, inp=1, inp_per=fields), "weight_scale": BY_OUTPUT}
        if self._asymmetric:
            tensors["weight_zero_point"] = Axes(out=0, inp=None, out_per=fields)
        if self._ordered:
            tensors["weight_g_idx"] = Axes(out=None, inp=0)
        return {**tensors, **dict.fromkeys(self._others, WHOLE)}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        scales = tensors["weight_scale"]
        fields = unpack(tensors["weight_packed"], self._bits, 1)
        half = torch.full(scales.shape, 1 << (self._bits - 1), dtype=torch.int16)
        zeros = unpack(tensors["weight_zero_point"], self._bits, 0).to(torch.int16) if self._asymmetric else half
        codes = whole_numbers(fields, zeros, scales, self._bits)
        if self._ordered:
            return grouped(codes, tensors["weight_g_idx"].long())
        return grouped(codes, indices(cut.cols, fields) // _group(self._group, cut))


class NvFp4:
    """weight = table[code] * scale / global scale; low halves of bytes first, scales of e4m3fn for each 16 inputs."""

    unit = 32

    def __init__(self, held: Collection[str]) -> None:
        """`held`: suffixes."""
        self._others = [name for name in held if name.startswith("input_")]

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        return self

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        others = dict.fromkeys(("weight_global_scale", *self._others), WHOLE)
        return {"weight_packed": Axes(out=0, inp=1, inp_per=2), "weight_scale": BY_OUTPUT, **others}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        pairs, table = tensors["weight_packed"], torch.tensor(POSITIVE)
        values = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)
        scales = tensors["weight_scale"].float() / tensors["weight_global_scale"].float()
        return grouped(Codes(values, scales, table=torch.cat((table, -table))), indices(cut.cols, values) // NVFP4_GROUP)


class Int8:
    """weight = (code - zero) * scale of its output."""

    unit = 32

    def __init__(self, held: Collection[str]) -> None:
        """`held`: suffixes."""
        self._others = [name for name in held if name.startswith("input_")]
        self._asymmetric = "weight_zero_point" in held

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        return self

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat; a scale for the whole matrix is whole."""
        tensors = {"weight": PLAIN, "weight_scale": WHOLE, **dict.fromkeys(self._others, WHOLE)}
        return {**tensors, "weight_zero_point": WHOLE} if self._asymmetric else tensors

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        rows = indices(cut.rows, tensors["weight"])

        def by_row(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, 1).expand(cut.out_features, 1)[rows] if tensor.numel() == 1 else tensor[rows]

        scales = by_row(tensors["weight_scale"])
        codes = Codes(tensors["weight"], scales)
        if self._asymmetric:
            codes = shifted(codes, -by_row(tensors["weight_zero_point"]).to(torch.int16))
        return grouped(codes, indices(cut.cols, scales) // (cut.in_features // scales.shape[1]))


def _group(stated: int | None, cut: Cut) -> int:
    return cut.in_features if stated in (None, -1) else stated


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return module == target or module.endswith(f".{target}")


@stored("compressed-tensors")
def _(settings: Settings) -> LinearFormat:
    schemes = []
    for group in settings.get("config_groups", {}).values():
        layout = group.get("format") or settings.get("format")
        if layout not in LAYOUTS:
            raise Unsupported(f"compressed-tensors in the layout {layout} are not read; read are {', '.join(LAYOUTS)}")
        if group.get("weights") is not None:
            schemes.append((list(group.get("targets", ())), group["weights"]))
    head = settings.get(HEAD)
    return CompressedTensors(schemes, choose(head, None).of("", "head", ()) if head else Dense())
