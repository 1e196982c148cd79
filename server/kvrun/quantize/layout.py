"""Codes of plain weights as the compressed-tensors format lays them out, and the config that says so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvrun.quant.bits import INTEGER, pack_rows
from kvrun.quant.codes import Codes
from kvrun.quant.made import GROUP, float8, int4, per_output

Tensors = dict[str, Tensor]
HEAD = "lm_head"  # what transformers and vLLM call any model's output matrix
ROWS = 1024  # outputs that are made codes of at once: each has scales of its own, and float32 copies stay small


@dataclass(frozen=True)
class Layout:
    """How a method stores the weights of linears."""

    name: str  # the format's own: "pack-quantized"
    kind: str  # "int" or "float"
    bits: int
    group: int | None  # inputs that share a scale; None = the whole row
    encode: Callable[[Tensor], Codes]  # of a weight [out, in] float32

    @property
    def per(self) -> int:
        """A module's inputs must be a multiple of this, or its codes would have no place in the layout."""
        return self.group or (INTEGER // self.bits if self.kind == "int" else 1)

    def tensors(self, weight: Tensor) -> Tensors:
        """What is stored for a weight [out, in], by suffix."""
        parts = [self._stored(self.encode(rows.float())) for rows in weight.split(ROWS)]
        stored = {suffix: _below([part[suffix] for part in parts]) for suffix in parts[0]}
        return stored if self.kind == "float" else stored | {"weight_shape": torch.tensor(weight.shape)}

    def _stored(self, codes: Codes) -> Tensors:
        if self.kind == "float":
            return {"weight": codes.values, "weight_scale": codes.scales}
        # Stored fields count from the smallest integer; those of 4 bits do so already.
        fields = codes.values if self.bits == 4 else codes.values.view(torch.uint8) ^ 128
        return {"weight_packed": pack_rows(fields, self.bits), "weight_scale": codes.scales}

    def config(self, coded: Iterable[str], plain: Iterable[str]) -> dict[str, Any]:
        """The `quantization_config` of a model whose modules `coded` are stored so, and whose modules `plain` are not."""
        by_group = {"strategy": "channel"} if self.group is None else {"strategy": "group", "group_size": self.group}
        weights = {"num_bits": self.bits, "type": self.kind, "symmetric": True, "dynamic": False, **by_group}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": self.name}
        return {
            "quant_method": "compressed-tensors",
            "format": self.name,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored(coded, plain),
        }


def layout(method: str, group: int | None) -> Layout:
    """The layout of a method that needs no data: int8, int4 or fp8; `group` None is the method's own."""
    if method == "int4":
        group = group or GROUP
        return Layout("pack-quantized", "int", 4, group, partial(int4, group=group))
    if method == "int8":
        return Layout("pack-quantized", "int", 8, None, partial(per_output, levels=127))
    return Layout("float-quantized", "float", 8, None, float8)


def ignored(coded: Iterable[str], plain: Iterable[str]) -> list[str]:
    """Patterns of the modules that stay plain, those of all layers in one. A model's classes may put names before a checkpoint's."""
    taken = {_of_any_layer(name) for name in coded}
    patterns = {f"re:(.*\\.)?{re.escape(name) if _of_any_layer(name) in taken else _of_any_layer(name)}$" for name in plain}
    return [HEAD, *sorted(patterns)]


def _of_any_layer(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _below(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].dtype == torch.float8_e4m3fn:  # floats of 8 bits do not concatenate
        return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return torch.cat(parts)
