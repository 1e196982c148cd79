"""The one form that every quantized weight takes in memory: codes of 4 or 8 bits with a scale for each group of inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WORD = 8  # a group of inputs is a multiple of this, or a whole row


@dataclass(frozen=True)
class Codes:
    """Codes [out, in], uint8 for 4 bits, int8 or float8_e4m3fn, and what they stand for: see ops.PackedQuantized.

    Where `order` is there, column j of the codes is input order[j] of the linear, and no input where that is -1.
    """

    values: Tensor
    scales: Tensor  # [out, groups]
    offsets: Tensor | None = None  # [out, groups]: int8 counts scales, a float adds itself
    group: int | None = None  # inputs; None = the whole row
    table: Tensor | None = None  # [16] that codes of 4 bits name; None = the integers from -8
    order: Tensor | None = None  # [in] int64
    units: Tensor | None = None  # [out, blocks * (1 or 2)] float16 that int8 scales, and offsets, count


def grouped(codes: Codes, groups: Tensor) -> Codes:
    """Codes whose input j belongs to group groups[j], as codes whose groups are equally long.

    `codes` come with the scales of every group there is. Inputs of a group that lie apart are brought together, and
    groups of which this rank holds only some inputs are filled up.
    """
    ids, members, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    offsets = None if codes.offsets is None else codes.offsets[:, ids]
    codes = replace(codes, scales=codes.scales[:, ids], offsets=offsets, units=_units(codes, ids))
    longest = int(counts.max())
    if len(ids) == 1:
        return replace(codes, group=None)
    even = bool((counts[:-1] == longest).all()) and longest % WORD == 0
    if even and bool((members[1:] >= members[:-1]).all()):
        return replace(codes, group=longest)
    longest = -(-longest // WORD) * WORD
    order = torch.full((len(ids), longest), -1)
    taken = torch.argsort(members, stable=True)
    places = torch.arange(len(taken)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    order[members[taken], places] = taken
    order = order.flatten()
    return replace(codes, values=arranged(codes.values, order), group=longest, order=order)


def _units(codes: Codes, ids: Tensor) -> Tensor | None:
    """The units that groups `ids` count: each for as many groups as before, or for the part of them into which these still fit."""
    if codes.units is None:
        return None
    units = codes.units.unflatten(1, (-1, 1 if codes.offsets is None else 2))
    block, first = codes.scales.shape[1] // units.shape[1], int(ids[0])
    adjacent = int(ids[-1]) - first == len(ids) - 1
    part = math.gcd(block, first, len(ids)) if adjacent else 1
    return units.repeat_interleave(block // part, dim=1)[:, ids[::part] // part].flatten(1)


def arranged(columns: Tensor, order: Tensor) -> Tensor:
    """Column order[j] of the last dimension at j, zeros where that is -1."""
    bare = columns.view(torch.uint8) if columns.dtype == torch.float8_e4m3fn else columns
    found = torch.nn.functional.pad(bare, (0, 1))[..., order]
    return found.view(columns.dtype)


def shifted(codes: Codes, shift: Tensor) -> Codes:
    """The same codes with `shift` [out, groups], whole numbers, added to each before its scale."""
    if not shift.any():
        return codes
    if shift.min() >= -128 and shift.max() <= 127:
        return replace(codes, offsets=shift.to(torch.int8))
    # Exact: a scale of 16 bits times a number of 9 fits a float32.
    return replace(codes, offsets=shift.float() * codes.scales.float())


def whole_numbers(fields: Tensor, zeros: Tensor, scales: Tensor, bits: int) -> Codes:
    """(field - zero) * scale, for fields of so many bits that count from 0.

    fields [out, in] uint8 · zeros [out, groups] int16 · scales [out, groups]
    """
    if bits > 4:
        return shifted(Codes((fields ^ 128).view(torch.int8), scales), 128 - zeros)
    first = int(zeros.flatten()[0])
    if bool((zeros == first).all()):
        return Codes(fields, scales, table=torch.arange(16.0) - first)
    return shifted(Codes(fields, scales), 8 - zeros)
