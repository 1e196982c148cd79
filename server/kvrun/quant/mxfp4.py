"""MXFP4: floats of 4 bits whose 32 neighbours share a power of two (OCP Microscaling 1.0), as gpt-oss stores its experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kvrun.quant.codes import Codes
from kvrun.quant.dense import Dense
from kvrun.quant.format import Axes, LinearFormat
from kvrun.quant.registry import Settings, stored
from kvrun.weights.plan import Cut, Role

BLOCK = 32
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the sign is the highest bit
BY_BLOCK = Axes(out=0, inp=1, inp_per=BLOCK)


class MxFp4:
    """weight = table[code] * 2 ** (scale - 127), low halves of bytes first; outputs by inputs, whichever way plain ones lie."""

    unit = BLOCK

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        return self if "blocks" in held else Dense()

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        return {"blocks": BY_BLOCK, "scales": BY_BLOCK}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        pairs, table = tensors["blocks"], torch.tensor(POSITIVE)
        values = torch.stack((pairs & 15, pairs >> 4), dim=3).flatten(1)
        # Powers of two: exact in bfloat16.
        scales = torch.exp2(tensors["scales"].float() - 127).bfloat16()
        return Codes(values, scales, group=BLOCK, table=torch.cat((table, -table)))


@stored("mxfp4")
def _(settings: Settings) -> LinearFormat:
    return MxFp4()
