"""Fields of a few bits in integers of 32, lowest bits first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INTEGER, BYTE = 32, 8


def period(bits: int) -> tuple[int, int]:
    """(fields, integers) of the shortest run of fields that ends where an integer ends: (8, 1) for 4 bits, (32, 3) for 3."""
    common = math.gcd(bits, INTEGER)
    return INTEGER // common, bits // common


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """int32 packed along a dimension -> uint8, that dimension longer. A field may straddle two integers."""
    if dim == packed.dim() - 1 and BYTE % bits == 0:
        return _of_bytes(packed.contiguous().view(torch.uint8), bits)
    fields, integers = period(bits)
    words = packed.movedim(dim, 0)
    words = words.reshape(-1, integers, *words.shape[1:])
    out = torch.empty((len(words), fields, *words.shape[2:]), dtype=torch.uint8)
    mask = (1 << bits) - 1
    for field in range(fields):
        word, low = divmod(field * bits, INTEGER)
        found = words[:, word] >> low
        if low + bits > INTEGER:
            left = INTEGER - low
            found = found & ((1 << left) - 1) | words[:, word + 1] << left
        out[:, field] = found & mask
    return out.flatten(0, 1).movedim(0, dim).contiguous()


def _of_bytes(packed: Tensor, bits: int) -> Tensor:
    if bits == BYTE:
        return packed
    mask = (1 << bits) - 1
    return torch.stack([packed >> low & mask for low in range(0, BYTE, bits)], dim=-1).flatten(-2)


def pack_rows(fields: Tensor, bits: int) -> Tensor:
    """[rows, n] uint8 fields of 4 or 8 bits -> [rows, n * bits / 32] int32, each row's end filled with zeros."""
    per = INTEGER // bits
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[1] % per))
    if bits == 4:
        fields = fields[:, 0::2] | fields[:, 1::2] << 4
    return fields.contiguous().view(torch.int32)
