"""mxfp4: floats of 4 bits with a power of two for each 32 inputs, as gpt-oss stores its experts (OCP Microscaling 1.0)."""

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
BIAS = 127  # of the exponents
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the other eight are their negatives


class Mxfp4:
    """weight = table[code] * 2 ** (exponent - 127). Outputs come first, also where the plain weight has inputs first."""

    unit = BLOCK

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        return self if "blocks" in held else Dense()

    def tensors(self) -> Mapping[str, Axes]:
        """See LinearFormat."""
        return dict.fromkeys(("blocks", "scales"), Axes(out=0, inp=1, inp_per=BLOCK))

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes:
        """See LinearFormat."""
        pairs, table = tensors["blocks"], torch.tensor(E2M1)
        values = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)
        return Codes(values, torch.exp2(tensors["scales"].float() - BIAS), group=BLOCK, table=torch.cat((table, -table)))


@stored("mxfp4")
def _(settings: Settings) -> LinearFormat:
    return Mxfp4()
