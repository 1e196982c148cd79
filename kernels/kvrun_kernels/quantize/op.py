"""Plain numbers as codes of 4 or 8 bits with scales: what every format that is made while weights load computes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu

SCHEMA = "quantize(Tensor weight, Scheme scheme) -> (Tensor codes, Tensor scales)"

SMALLEST = 1e-12  # a row of zeros keeps a scale that can be divided by (cpu.cpp: kSmallest)
FLOAT8 = torch.float8_e4m3fn

_kernel = Kernel("quantize", "ppppp iiii ii f", elsewhere="torch")
_INT8, _FLOAT8, _INT4, _TABLE = range(4)


@dataclass(frozen=True, eq=False)
class Scheme:
    """How numbers become codes, and which of them share a scale.

    int8 and float8_e4m3fn: one float32 scale for a whole row, whose largest magnitude is `levels` steps.
    uint8: 4 bits, a scale for every `group` inputs. Without a table -8 to 7, stored 8 higher, and float16 scales: the group's
    largest number is exactly -8 steps. With one, [16] numbers between -1 and 1, the nearest of them to each number's share of
    the group's largest magnitude, which is its float32 scale.
    """

    codes: torch.dtype
    levels: int = 8
    group: int | None = None
    table: Tensor | None = None


def reference(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    groups = _groups(weight.float(), scheme.group or max(weight.shape[1], 1))
    if scheme.table is not None:
        codes, scales = _by_table(groups, scheme.table.to(groups.device))
    elif scheme.codes == torch.uint8:
        codes, scales = _by_steps(groups)
    else:
        scales = groups.abs().amax(2, keepdim=True).clamp(min=SMALLEST) / scheme.levels
        steps = groups / scales
        codes = steps.to(FLOAT8) if scheme.codes == FLOAT8 else steps.round().clamp(-128, 127).to(torch.int8)
    return codes.flatten(1)[:, : weight.shape[1]].contiguous(), scales.squeeze(2)


def _by_steps(groups: Tensor) -> tuple[Tensor, Tensor]:
    most, least = groups.amax(2, keepdim=True), groups.amin(2, keepdim=True)
    scales = (torch.where(most > -least, most, least) / -8).half()
    step = torch.where(scales == 0, 1, scales).float()
    return (groups / step).round().clamp(-8, 7).add(8).to(torch.uint8), scales


def _by_table(groups: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    scales = groups.abs().amax(2, keepdim=True)
    middles, places = _halved(table)
    shares = groups / torch.where(scales == 0, 1, scales)
    return places[torch.bucketize(shares, middles)].to(torch.uint8), scales


def _halved(table: Tensor) -> tuple[Tensor, Tensor]:
    """Where the nearest entry changes, and the entries' codes, both from the least to the largest."""
    entries, places = table.sort()
    return (entries[1:] + entries[:-1]) / 2, places


def _groups(weight: Tensor, group: int) -> Tensor:
    """[rows, in] -> [rows, groups, group], zeros after the last input."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))


def quantize(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes [rows, in] of finite numbers [rows, in], and their scales [rows, groups], as the scheme says. Rows know of no others.

    Divisions and roundings are IEEE's, so that every level and the reference give the same bits.
    """
    run = _kernel.run
    if run is None or 0 in weight.shape or not on_cpu(weight):
        return reference(weight, scheme)
    rows, inputs = weight.shape
    group = scheme.group or inputs
    codes = torch.empty((rows, inputs), dtype=scheme.codes)
    half = scheme.codes == torch.uint8 and scheme.table is None
    scales = torch.empty((rows, -(-inputs // group)), dtype=torch.float16 if half else torch.float32)
    middles, places = (None, None) if scheme.table is None else _halved(scheme.table)
    kind = {torch.int8: _INT8, FLOAT8: _FLOAT8}.get(scheme.codes, _INT4 if middles is None else _TABLE)
    steps = None if places is None else places.diff(prepend=places.new_zeros(1)).to(torch.int32)
    run(
        codes.data_ptr(), scales.data_ptr(), weight.data_ptr(), None if middles is None else middles.data_ptr(),
        None if steps is None else steps.data_ptr(), rows, inputs, weight.stride(0), group, kind, DTYPES[weight.dtype], scheme.levels,
    )  # fmt: skip
    return codes, scales
