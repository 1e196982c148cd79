"""Weights of 4 or 8 bits as a GPU reads them: row by row, so that a tile of any shape is a few straight runs of bytes."""

import torch
from torch import Tensor

from kvrun_kernels.quantized_linear.op import PackedQuantized

ALIGNED = 16  # bytes that a row is a multiple of: the widest load
SIDE = 16  # inputs and outputs are a multiple of it, or the library's product of 8-bit floats refuses


class QuantizedRows(PackedQuantized):
    """A weight [out_features, in_features] as rows of codes; what they stand for, PackedQuantized says.

    panels [out, bytes] uint8, ends filled with zeros: of 4 bits, input 2j lies in the lower half of byte j and 2j + 1 in the
    upper · scales and offsets [groups, out] · units [blocks * (1 or 2), out]
    """

    __slots__ = ()

    @property
    def narrow(self) -> torch.dtype | None:
        """See PackedQuantized. Floats meet floats where each output has one scale."""
        whole = len(self.scales) == 1 and self.in_features % SIDE == self.out_features % SIDE == 0
        return self.codes if whole and self.codes == torch.float8_e4m3fn else super().narrow

    def rows(self, ids: Tensor) -> Tensor:
        """Output rows `ids` of the weight they stand for. -> [ids, in] float32"""
        ids = ids.to(self.panels.device)
        held = self.panels[ids]
        if self.codes == torch.uint8:
            values = self.table[torch.stack((held & 15, held >> 4), dim=-1).flatten(1).int()]
        else:
            values = held.view(self.codes).float()
        return self.scaled(values, *(None if part is None else part[:, ids].T for part in (self.scales, self.offsets, self.units)))


def pack_rows(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, table: Tensor, group: int, units: Tensor | None = None, block: int = 0
) -> QuantizedRows:
    """Lay out codes [out, in] with scales and offsets [out, groups]; arguments are as `pack_quantized` has checked them."""
    out_features, in_features = codes.shape
    held = codes.view(torch.uint8)
    if codes.dtype == torch.uint8:
        held = torch.nn.functional.pad(held, (0, in_features % 2))
        held = held[:, 0::2] | held[:, 1::2] << 4
    held = torch.nn.functional.pad(held, (0, -held.shape[1] % ALIGNED)).contiguous()
    offsets, units = (None if part is None else part.T.contiguous() for part in (offsets, units))
    shape = out_features, in_features
    return QuantizedRows(codes.dtype, held, scales.T.contiguous(), offsets, table.to(codes.device), group, shape, units, block)
