"""Codes of plain weights as the compressed-tensors format lays them out, and the config that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from kvrun_kernels.ops import Scheme
from torch import Tensor

from kvrun.quant.bits import INTEGER, pack_rows
from kvrun.quant.codes import Codes
from kvrun.quant.made import FLOAT8, GROUP, INT8, encoded, int4
from kvrun.weights import held

Tensors = dict[str, Tensor]
LM_HEAD = "lm_head"  # what transformers and vLLM call any model's output matrix


@dataclass(frozen=True)
class Layout:
    """How a method stores the weights of linears."""

    name: str  # the format's own: "pack-quantized"
    kind: str  # "int" or "float"
    bits: int
    group: int | None  # inputs that share a scale; None = the whole row
    scheme: Scheme  # how weights become codes
    method: str  # the value of --quantize that makes the same

    @property
    def per(self) -> int:
        """A module's inputs must be a multiple of this, or its codes would have no place in the layout."""
        return self.group or (INTEGER // self.bits if self.kind == "int" else 1)

    def tensors(self, weight: Tensor) -> Tensors:
        """What is stored for a weight [out, in], by suffix."""
        stored = self._stored(encoded(weight, self.scheme))
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
            **({held.HEAD: self.method} if self.method in held.HEADED else {}),
        }


def layout(method: str, group: int | None) -> Layout:
    """The layout of a method that needs no data: int8, int4 or fp8; `group` None is the method's own."""
    if method == "int4":
        group = group or GROUP
        return Layout("pack-quantized", "int", 4, group, int4(group), method)
    if method == "int8":
        return Layout("pack-quantized", "int", 8, None, INT8, method)
    return Layout("float-quantized", "float", 8, None, FLOAT8, method)


def ignored(coded: Iterable[str], plain: Iterable[str]) -> list[str]:
    """Patterns of the modules that stay plain, those of all layers in one. A model's classes may put names before a checkpoint's."""
    taken = {_of_any_layer(name) for name in coded}
    patterns = {f"re:(.*\\.)?{re.escape(name) if _of_any_layer(name) in taken else _of_any_layer(name)}$" for name in plain}
    return [LM_HEAD, *sorted(patterns)]


def _of_any_layer(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
