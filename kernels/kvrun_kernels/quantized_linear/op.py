"""Matrix products with weights of 4 or 8 bits that share scales in groups, packed once into the layout the kernel streams."""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from kvrun_kernels import large
from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu, on_gpu
from kvrun_kernels.pack_panels.op import NIBBLE_ORDER, PANEL, pack_panels

SCHEMA = "quantized_linear(Tensor x, PackedQuantized packed, Tensor? bias=None, *, bool rounded=False) -> Tensor"

# Inputs are padded to this, and a group is a multiple of it: one word of nibbles.
WORD = 8
# Inputs that one chain of a sum takes at most; a longer group repeats its scale (cpu.cpp: kBlock).
LONGEST_GROUP = 512
# What the kernel reads an e4m3fn code of one as, to the power of -1.
FLOAT8_UNIT = 256.0
INTEGERS = tuple(float(code) for code in range(-8, 8))

_kernel = Kernel("quantized_linear", "pppppppp iiii iiiiiiii")
_FORMS = {torch.uint8: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
_ABSENT, _BYTES = -1, 3
_FLOAT32, _BFLOAT16, _ROUNDED = range(3)


class PackedQuantized:
    """A weight [out_features, in_features] as codes in panels of 32 outputs, with a scale for every `group` inputs.

    A weight is `scale * table[code]` for codes of 4 bits and `scale * code` for int8 and float8_e4m3fn. To that adds
    `scale * shift` where `offsets` is int8 (a zero point), or the offset itself where it is a float. Where there are `units`,
    scales and offsets are int8 and count them: one unit each for `block` groups, a power of two.
    """

    __slots__ = (
        "block", "codes", "exact_in_bfloat16", "first", "group", "in_features", "integers", "offsets", "out_features", "panels", "scales",
        "table", "units",
    )  # fmt: skip

    def __init__(
        self,
        codes: torch.dtype,
        panels: Tensor,
        scales: Tensor,
        offsets: Tensor | None,
        table: Tensor,
        group: int,
        shape: tuple[int, int],
        units: Tensor | None = None,
        block: int = 0,
    ):
        self.codes = codes  # uint8 for 4 bits, int8 or float8_e4m3fn
        self.panels = panels  # [panels, inputs / 8, 32, 4] uint8 for 4 bits, else [panels, inputs / 2, 32, 2]
        self.scales = scales  # [panels, groups, 32]
        self.offsets = offsets  # [panels, groups, 32]
        self.table = table  # [16] float32
        self.units = units  # [panels, blocks * (1 or 2), 32] float16: that of scales, then that of offsets where they are
        self.block = block  # groups that share a unit; 0 without units
        self.out_features, self.in_features = shape
        self.group = group  # inputs; the last group may be shorter
        self.first = float(table[0])  # what code 0 stands for
        # Whole numbers apart by one can be counted, so that inputs of 8 bits may meet them.
        counted = codes == torch.uint8 and torch.equal(table, torch.arange(16.0, device=table.device) + round(self.first))
        self.integers = codes == torch.int8 or counted
        # Where this holds, inputs of bfloat16 may meet the codes in bfloat16: nothing is rounded.
        self.exact_in_bfloat16 = codes == torch.int8 or (codes == torch.uint8 and torch.equal(table, table.bfloat16().float()))

    @property
    def narrow(self) -> torch.dtype | None:
        """The numbers of 8 bits that inputs may be rounded to where they meet these codes; None where they stay as they are."""
        return torch.int8 if self.integers else None

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and padding included."""
        return sum(part.nbytes for part in (self.panels, self.scales, self.offsets, self.units) if part is not None)

    @property
    def form(self) -> tuple[object, ...]:
        """See grouped.Packed."""
        offsets = None if self.offsets is None else self.offsets.dtype
        return self.codes, self.group, self.scales.dtype, offsets, self.block, self.integers, self.exact_in_bfloat16

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """See grouped.Packed."""
        return self.panels, self.scales, self.offsets, self.table, self.units

    def rows(self, ids: Tensor) -> Tensor:
        """Output rows `ids` of the weight they stand for. -> [ids, in] float32"""
        panel, row = ids // PANEL, ids % PANEL
        held = self.panels[panel, :, row].flatten(1)
        if self.codes == torch.uint8:
            nibbles = torch.stack((held & 15, held >> 4), dim=-1).view(len(ids), -1, WORD)
            codes = torch.empty_like(nibbles)
            codes[..., NIBBLE_ORDER] = nibbles
            values = self.table[codes.flatten(1).int()]
        else:
            values = held.view(self.codes).float()
            if self.codes == torch.float8_e4m3fn:
                values = values / FLOAT8_UNIT
        return self.scaled(values, *(None if part is None else part[panel, :, row] for part in (self.scales, self.offsets, self.units)))

    def dense(self) -> Tensor:
        """The whole weight they stand for. -> [out_features, in_features] float32"""
        return self.rows(torch.arange(self.out_features))

    def scaled(self, values: Tensor, scales: Tensor, offsets: Tensor | None, units: Tensor | None) -> Tensor:
        """What codes of these values stand for, with their rows' scales and offsets [ids, groups] and units [ids, blocks * (1 or 2)]."""
        if units is not None:
            scales, offsets = counted(scales, offsets, units, self.block)
        values, weight = values[:, : self.in_features], self._spread(scales.float())
        if offsets is None:
            return values * weight
        if offsets.dtype == torch.int8:
            return (values + self._spread(offsets.float())) * weight
        return values * weight + self._spread(offsets.float())

    def _spread(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.group, dim=1)[:, : self.in_features]


def counted(scales: Tensor, offsets: Tensor | None, units: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
    """What bytes [rows, groups] amount to that count units [rows, blocks * (1 or 2)]: scales and offsets, float32, exactly."""
    sides = units.float().unflatten(1, (-1, 1 if offsets is None else 2)).repeat_interleave(block, dim=1)
    return scales.float() * sides[..., 0], None if offsets is None else offsets.float() * sides[..., 1]


def pack_quantized(
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    *,
    group: int | None = None,
    table: Tensor | None = None,
    units: Tensor | None = None,
) -> PackedQuantized:
    """Lay out codes for `quantized_linear`; see PackedQuantized for what they stand for.

    codes [out, in], uint8 (0 to 15), int8 or float8_e4m3fn · scales and offsets [out, groups], one for each `group` inputs or
    for the whole row · table [16], the integers from -8 when absent · units [out, blocks * (1 or 2)] float16, all blocks being of as
    many groups, a power of two. ValueError when a group is not a multiple of 8 inputs.
    """
    return pack_quantized_rows([CodedRows(codes, scales, offsets, units)], len(codes), group=group, table=table)


class CodedRows(NamedTuple):
    """Some rows of what `pack_quantized` takes."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    units: Tensor | None = None


def pack_quantized_rows(
    parts: Iterable[CodedRows], out_features: int, *, group: int | None = None, table: Tensor | None = None
) -> PackedQuantized:
    """`pack_quantized` of a weight that comes some rows at a time, all of one form, each needed until the next comes."""
    parts = iter(parts)
    first = next(parts)
    in_features, inputs = first.codes.shape[1], -(-first.codes.shape[1] // WORD) * WORD
    group = inputs if group is None else group
    checked = (_checked(part, in_features, group) for part in chain([first], parts))
    held, given = _chain(group), torch.tensor(INTEGERS) if table is None else table.float().contiguous()
    if on_gpu(first.codes) or not first.codes.is_cpu:
        # Only there: what a GPU reads needs neither panels nor short groups.
        from kvrun_kernels.quantized_linear.rows import pack_rows

        whole = _joined(list(checked))
        return pack_rows(whole.codes, whole.scales, whole.offsets, given, group, whole.units, _block(whole))
    dtype, panels = first.codes.dtype, -(-out_features // PANEL)
    nibbles = dtype == torch.uint8
    laid = large.zeros((panels, inputs // WORD, PANEL, 4) if nibbles else (panels, inputs // 2, PANEL, 2), torch.uint8)
    columns: list[Tensor | None] = []  # of scales, offsets and units
    at = block = 0
    for part in checked:
        block = _block(part) if held == group else 0
        found = _per_group(part, group, held)
        columns = columns or [None if one is None else large.zeros((panels, one.shape[1], PANEL, 1), one.dtype) for one in found]
        pack_panels(laid, part.codes.view(torch.uint8), at, nibbles=nibbles)
        for column, rows in zip(columns, found, strict=True):
            if column is not None and rows is not None:
                pack_panels(column, rows, at)
        at += len(part.codes)
    scales, offsets, units = (None if column is None else column.squeeze(3) for column in columns)
    assert scales is not None
    return PackedQuantized(dtype, laid, scales, offsets, given, held, (out_features, in_features), units, block)


def _checked(part: CodedRows, in_features: int, group: int) -> CodedRows:
    if part.codes.dtype not in _FORMS:
        raise ValueError(f"codes of uint8, int8 or float8_e4m3fn asked, found {part.codes.dtype}; convert them first")
    wanted = (len(part.codes), -(-in_features // group))
    if part.scales.shape != wanted:
        raise ValueError(f"scales of shape {list(wanted)} asked, found {list(part.scales.shape)}; one for each {group} inputs")
    if part.codes.dtype == torch.float8_e4m3fn and part.offsets is not None:
        raise ValueError("codes of float8_e4m3fn come without offsets; leave them out")
    return part


def _per_group(part: CodedRows, group: int, held: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales, offsets and units as the kernel takes them: a long group is several, each with its scale."""
    _, scales, offsets, units = part
    if part.codes.dtype == torch.float8_e4m3fn:
        scales = scales.float() * FLOAT8_UNIT
    if held == group:
        return scales, offsets, units
    if units is not None:
        scales, offsets = counted(scales, offsets, units, _block(part))
    groups = -(-part.codes.shape[1] // held)

    def spread(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(group // held, dim=1)[:, :groups]

    return spread(scales), None if offsets is None else spread(offsets), None


def _joined(parts: list[CodedRows]) -> CodedRows:
    if len(parts) == 1:
        return parts[0]
    codes, *others = zip(*parts, strict=True)
    # Floats of 8 bits do not concatenate.
    rows = torch.cat([part.view(torch.uint8) for part in codes]).view(codes[0].dtype)
    return CodedRows(rows, *(None if column[0] is None else torch.cat(column) for column in others))


def _block(part: CodedRows) -> int:
    """How many groups share a unit, 0 without units. ValueError says what does not fit."""
    _, scales, offsets, units = part
    if units is None:
        return 0
    groups, blocks = scales.shape[1], units.shape[1] // (1 if offsets is None else 2)
    counts = scales.dtype == torch.int8 and (offsets is None or offsets.dtype == torch.int8)
    if not counts or units.dtype != torch.float16 or not blocks or groups % blocks or (groups // blocks).bit_count() > 1:
        found = f"{scales.dtype} {list(scales.shape)} and {units.dtype} {list(units.shape)}"
        raise ValueError(f"int8 counts of float16 units asked, each for 1, 2, 4, 8 or so groups, found {found}; multiply them first")
    return groups // blocks


def _chain(group: int) -> int:
    """The longest group that the kernel takes and this one is made of."""
    if group % WORD:
        raise ValueError(f"groups of a multiple of {WORD} inputs asked, found {group}; this cut of the weight has no kernel")
    if group <= LONGEST_GROUP:
        return group
    return next(shorter for shorter in range(LONGEST_GROUP, 0, -WORD) if group % shorter == 0)


def in_8_bits(x: Tensor, group: int) -> Tensor:
    """What is left of x [rows, in] when each group of inputs is rounded to 127 steps of its largest magnitude. float32"""
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    most = groups.abs().amax(2, keepdim=True)
    codes = (groups * torch.where(most > 0, 127 / most, 0)).round()
    return (codes * (most / 127)).flatten(1)[:, : x.shape[1]]


def reference(x: Tensor, packed: PackedQuantized, bias: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    held = in_8_bits(x, packed.group) if rounded and packed.integers else x.float()
    out = held @ packed.dense().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def quantized_linear(x: Tensor, packed: PackedQuantized, bias: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """Multiply rows by the transpose of what the codes stand for and add the bias; sums are float32 and rounded once.

    x [rows, in_features] · bias [out_features] · out [rows, out_features], dtype of x. A row's result is the same to
    the bit whatever the number of rows. `rounded`: inputs in 8 bits, faster and not exact: where codes are integers, see
    `in_8_bits`, or floats on a GPU, which must be one that scaled.py names.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x of shape [rows, {packed.in_features}] asked, found {list(x.shape)}; reshape it first")
    if gpu := _kernel.triton(x, bias):
        return gpu.quantized_linear(x, packed, bias, rounded=rounded)
    if _kernel.run is None or not on_cpu(x, bias):
        return reference(x, packed, bias, rounded=rounded)
    out = torch.empty((x.shape[0], packed.out_features), dtype=x.dtype)
    _kernel.run(
        out.data_ptr(), x.data_ptr(), packed.panels.data_ptr(), packed.scales.data_ptr(),
        None if packed.offsets is None else packed.offsets.data_ptr(), packed.table.data_ptr(),
        None if packed.units is None else packed.units.data_ptr(), None if bias is None else bias.data_ptr(),
        x.shape[0], packed.out_features, packed.in_features, x.stride(0),
        *described(x, packed, None if bias is None else bias.dtype, rounded),
    )  # fmt: skip
    return out


def described(x: Tensor, packed: PackedQuantized, bias: torch.dtype | None, rounded: bool) -> tuple[int, ...]:
    """The last arguments of native code: what the numbers that it reads are, and in which arithmetic it multiplies them."""
    offsets = packed.offsets
    scale = _BYTES if packed.block else DTYPES[packed.scales.dtype]
    offset = _ABSENT if offsets is None else _BYTES if offsets.dtype == torch.int8 else DTYPES[offsets.dtype]
    arithmetic = _ROUNDED if rounded and packed.integers else _BFLOAT16 if packed.exact_in_bfloat16 else _FLOAT32
    types = (_FORMS[packed.codes], scale, offset, packed.block, DTYPES[x.dtype], 0 if bias is None else DTYPES[bias])
    return packed.group, *types, arithmetic
