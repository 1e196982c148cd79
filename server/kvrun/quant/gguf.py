"""GGUF: blocks of inputs with scales of their own, in a layout for each type (ggml's block types).

What a type stands for is exact in a scale, and an offset where it has one, for each group of inputs: a half, or an integer of 8 bits
that counts a half which the groups of a block share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvrun.gguf import PLAIN, TYPES
from kvrun.quant.coded import CodedLinear
from kvrun.quant.codes import Codes, grouped
from kvrun.quant.dense import Dense
from kvrun.quant.format import WHOLE, Blocks, LinearFormat, Stretch
from kvrun.quant.registry import Settings, stored
from kvrun.weights.load import indices, torch_dtype
from kvrun.weights.plan import Cut, Role

BYTES = {kind.name: Blocks(kind.values, kind.bytes) for kind in TYPES.values()}
COUNTED = torch.arange(16.0)  # codes of 4 bits that count from 0
IQ4 = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]).float()


class Gguf:
    """Each module by the type that its tensor is called by."""

    unit = 32

    def __init__(self, kind: str = "") -> None:
        """`kind`: the type of a module's tensor."""
        self._kind = kind

    def of(self, module: str, role: Role, held: Collection[str]) -> LinearFormat:
        """See LinearFormat."""
        kinds = {part: name for name in held for part, _, kind in (name.rpartition("."),) if kind in BYTES}
        if "keys" in kinds and "values" in kinds:
            return KeysAndValues(kinds["keys"], kinds["values"])
        return Gguf(kinds[""]) if "" in kinds else Dense()

    def tensors(self) -> Mapping[str, Stretch]:
        """See LinearFormat."""
        return {self._kind: BYTES[self._kind]}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Codes | Tensor:
        """See LinearFormat."""
        blocks = tensors[self._kind]
        if self._kind in PLAIN:
            return blocks.flatten(1).view(torch_dtype(self._kind))
        places = indices(BYTES[self._kind].places(cut), blocks)
        codes = _codes(self._kind, blocks)
        if len(places) == codes.values.shape[1]:
            return codes
        assert codes.group is not None, "blocks have groups"
        return grouped(replace(codes, values=codes.values[:, places].contiguous(), group=None), places // codes.group)


class KeysAndValues(Gguf):
    """A matrix in two tensors: each head's keys, turned round, and its values. Blocks that are turned round are none: numbers."""

    def __init__(self, keys: str, values: str) -> None:
        """`keys`, `values`: the tensors' suffixes, "keys.Q8_0"."""
        super().__init__()
        self._keys, self._values = keys, values

    def tensors(self) -> Mapping[str, Stretch]:
        """See LinearFormat."""
        return {self._keys: WHOLE, self._values: WHOLE}

    def decode(self, tensors: Mapping[str, Tensor], cut: Cut) -> Tensor:
        """See LinearFormat."""
        keys, values = (_numbers(tensors[name], name.rpartition(".")[2]) for name in (self._keys, self._values))
        whole = torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)
        return whole[indices(cut.rows, whole)][:, indices(cut.cols, whole)]


def _numbers(blocks: Tensor, kind: str) -> Tensor:
    """What blocks [heads, rows, blocks, bytes] stand for. -> [heads, rows, inputs] float32"""
    rows = blocks.flatten(0, 1)
    if kind in PLAIN:
        return rows.flatten(1).view(torch_dtype(kind)).float().unflatten(0, blocks.shape[:2])
    codes = _codes(kind, rows)
    return CodedLinear(codes, codes.values.shape[1]).dense().unflatten(0, blocks.shape[:2])


def _codes(kind: str, blocks: Tensor) -> Codes:
    """What blocks [out, blocks, bytes] hold."""
    parts = DECODERS[kind](blocks)
    offsets = None if parts.offsets is None else parts.offsets.flatten(1)
    units = None if parts.units is None else parts.units.flatten(1)
    group = parts.values[0].numel() // parts.scales[0].numel()
    return Codes(parts.values.flatten(1), parts.scales.flatten(1), offsets, group, parts.table, units=units)


@dataclass(frozen=True)
class Parts:
    """What blocks [out, blocks, bytes] hold: values [out, blocks, inputs], scales and offsets [out, blocks, groups].

    Where there are units [out, blocks, 1 or 2], scales and offsets count them.
    """

    values: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    table: Tensor | None = None
    units: Tensor | None = None


def _half(blocks: Tensor, at: int, count: int = 1) -> Tensor:
    """The float16 at a byte of each block, and those after it. -> [out, blocks, count]"""
    return blocks[..., at : at + 2 * count].contiguous().view(torch.float16)


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Fields of a few bits: of each `run` bytes first their lowest fields, then the next. [..., bytes] -> [..., fields] uint8"""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(1)
    runs = packed.unflatten(-1, (-1, 1, run))
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(-3)


def _q4_0(blocks: Tensor) -> Parts:
    return Parts(_fields(blocks[..., 2:], 4, 16), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Parts:
    return Parts(_fields(blocks[..., 4:], 4, 16), _half(blocks, 0), _half(blocks, 2), COUNTED)


def _fifth(blocks: Tensor, at: int) -> Tensor:
    """Four bits of each value from byte `at` + 4 on, its fifth in the 32 bits before. -> [out, blocks, 32] uint8"""
    high = _fields(blocks[..., at : at + 4], 1, 1)
    return _fields(blocks[..., at + 4 :], 4, 16) | high << 4


def _q5_0(blocks: Tensor) -> Parts:
    return Parts(_fifth(blocks, 2).to(torch.int8) - 16, _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Parts:
    return Parts(_fifth(blocks, 4).to(torch.int8), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Parts:
    return Parts(blocks[..., 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Parts:
    both = blocks[..., :16].view(torch.int8)
    return Parts(_fields(blocks[..., 16:80], 2, 32), both & 15, -(both >> 4 & 15), COUNTED, _half(blocks, 80, 2))


def _q3_k(blocks: Tensor) -> Parts:
    high, packed = _fields(blocks[..., :32], 1, 32), blocks[..., 96:108]
    scales = _fields(packed[..., :8], 4, 8) | _fields(packed[..., 8:], 2, 4) << 4
    return Parts(_fields(blocks[..., 32:96], 2, 32) | high << 2, scales.to(torch.int8) - 32, None, COUNTED - 4, _half(blocks, 108))


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eight of each, of 6 bits, in 12 bytes after their two units."""
    first, second, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1)
    offsets = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1)
    return scales.to(torch.int8), -offsets.to(torch.int8)


def _q4_k(blocks: Tensor) -> Parts:
    return Parts(_fields(blocks[..., 16:], 4, 32), *_scales_and_offsets(blocks), COUNTED, _half(blocks, 0, 2))


def _q5_k(blocks: Tensor) -> Parts:
    fields = _fields(blocks[..., 48:], 4, 32) | _fields(blocks[..., 16:48], 1, 32) << 4
    return Parts(fields.to(torch.int8), *_scales_and_offsets(blocks), None, _half(blocks, 0, 2))


def _q6_k(blocks: Tensor) -> Parts:
    low, high = _fields(blocks[..., :128], 4, 64), _fields(blocks[..., 128:192], 2, 32)
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return Parts((low | high << 4).to(torch.int8) - 32, scales, units=_half(blocks, 208))


def _iq4_nl(blocks: Tensor) -> Parts:
    return Parts(_fields(blocks[..., 2:], 4, 16), _half(blocks, 0), None, IQ4)


def _iq4_xs(blocks: Tensor) -> Parts:
    scales = _fields(blocks[..., 4:8], 4, 1) | _fields(blocks[..., 2:4], 2, 1) << 4
    return Parts(_fields(blocks[..., 8:], 4, 16), scales.to(torch.int8) - 32, None, IQ4, _half(blocks, 0))


DECODERS: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


@stored("gguf")
def _(settings: Settings) -> LinearFormat:
    return Gguf()
