"""Weights of 8-bit floats with a scale for the whole matrix, each output, or each block of outputs and inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kvrun.errors import Unsupported
from kvrun.quant.codes import Codes, grouped
from kvrun.quant.dense import PLAIN, Dense
from kvrun.quant.format import WHOLE, Axes, LinearFormat
from kvrun.quant.registry import Settings, stored
from kvrun.weights.load import indices
from kvrun.weights.plan import Cut, Role

SCALES = ("weight_scale", "weight_scale_inv")  # both multiply, whatever the second's name says


class Float8:
    """weight = e4m3fn code * scale. Scales of activations are left unread: activations stay as they are."""

    unit = 32

    def __init__(self, block: tuple[int, int] | None, scale: str = "", others: Collection[str] = ()) -> None:
        """`block`: outputs and inputs that share a scale; None = by the scale's shape."""
        self._block, self._scale, self._others = block, scale, others

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        scale = next((name for name in SCALES if name in held), None)
        if scale is None:
            return Dense()
        return Float8(self._block, scale, [name for name in held if name.startswith("input_scale")])

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        return {"weight": PLAIN, self._scale: WHOLE, **dict.fromkeys(self._others, WHOLE)}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        weight, scale = tensors["weight"], tensors[self._scale].float()
        if weight.dtype != torch.float8_e4m3fn:
            raise Unsupported(f"{cut.module}: weights of {weight.dtype} with scales are not read; read are those of float8_e4m3fn")
        rows = indices(cut.rows, weight)
        if scale.numel() == 1:
            return Codes(weight, scale.reshape(1, 1).expand(len(rows), 1))
        if self._block is None or scale.shape[0] == cut.out_features:
            return Codes(weight, scale.reshape(cut.out_features, -1)[rows])
        high, wide = self._block
        return grouped(Codes(weight, scale[rows // high]), indices(cut.cols, weight) // wide)


@stored("fp8")
@stored("fbgemm_fp8")
def _(settings: Settings) -> LinearFormat:
    block = settings.get("weight_block_size")
    return Float8(None if block is None else (block[0], block[1]))
