"""Low-rank updates of row segments, each by an adapter of its own rank (BGMV for single rows, SGMV for runs)."""

from array import array
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu, on_gpu
from kvrun_kernels.sgmv.table import FIELDS, INPUTS, PARTS, REACH, LoraPointers, LoraSites, LoraTable, LoraUse

SCHEMA = "lora(Tensor(a!) y, Tensor x, LoraSegments | LoraUse segments) -> ()"

_kernel = Kernel("sgmv", "ppp iiii iii")


class Segment(NamedTuple):
    """Rows start..stop get the update of one adapter at columns column..column + n of the output.

    a [rank, in] · bt [rank, n], with the adapter's scale folded in · both contiguous and of one dtype.
    """

    start: int
    stop: int
    a: Tensor
    bt: Tensor
    column: int


class LoraSegments:
    """The segments of one linear in one batch, checked and laid out for the kernel.

    Build it once for a batch's composition and keep it while that stays the same. No two segments may touch the same
    element of the output. The tensors are kept alive.
    """

    def __init__(self, segments: Iterable[Segment]):
        self.parts: tuple[tuple[LoraSegments, int, int], ...] = ()
        self.segments = tuple(segments)
        self.stop = max((s.stop for s in self.segments), default=0)
        self.columns = max((s.column + s.bt.shape[1] for s in self.segments), default=0)
        self.inputs = self.segments[0].a.shape[1] if self.segments else 0
        self.dtype = self.segments[0].a.dtype if self.segments else torch.float32
        self.device = self.segments[0].a.device if self.segments else torch.device("cpu")
        self.alike = True
        table = array("q")
        for s in self.segments:
            rank, inputs = s.a.shape
            if inputs != self.inputs or s.bt.shape[0] != rank or not 0 <= s.start <= s.stop or s.column < 0:
                raise ValueError(
                    f"segment of rows {s.start}..{s.stop} with a {list(s.a.shape)}, bt {list(s.bt.shape)} at column "
                    f"{s.column}; a must be [rank, {self.inputs}], bt [rank, columns], and start <= stop"
                )
            self.alike &= s.a.dtype == s.bt.dtype == self.dtype and s.a.is_contiguous() and s.bt.is_contiguous()
            table.extend((s.start, s.stop, s.a.data_ptr(), s.bt.data_ptr(), rank, s.bt.shape[1], s.column))
        self.native = self.alike and on_cpu(*(s.a for s in self.segments))
        self.table = table
        self.address = table.buffer_info()[0]

    @classmethod
    def joined(cls, parts: Iterable[tuple["LoraSegments", int, int]]) -> "LoraSegments":
        """Each part's updates for rows start..stop instead of its own, without checking again: (part, start, stop), at least one.

        For batches whose rows change from step to step while their adapters stay.
        """
        parts = tuple(parts)
        first = parts[0][0]
        joined = cls.__new__(cls)
        joined.parts = parts  # keeps the tensors alive
        joined.stop = max(stop for _, _, stop in parts)
        joined.columns = max(part.columns for part, _, _ in parts)
        joined.inputs, joined.dtype = first.inputs, first.dtype
        joined.device = first.device
        joined.alike = all(part.alike and part.dtype == first.dtype and part.inputs == first.inputs for part, _, _ in parts)
        joined.native = joined.alike and all(part.native for part, _, _ in parts)
        table = array("q")
        for part, start, stop in parts:
            moved = part.table[:]
            moved[0::FIELDS] = array("q", (start,)) * len(part)
            moved[1::FIELDS] = array("q", (stop,)) * len(part)
            table += moved
        joined.table = table
        joined.address = table.buffer_info()[0]
        return joined

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Every segment; those of joined parts are only written out when somebody asks, which the native kernel never does."""
        return tuple(Segment(start, stop, s.a, s.bt, s.column) for part, start, stop in self.parts for s in part.segments)

    @cached_property
    def on_gpu(self) -> LoraUse | None:
        """What a GPU reads of them; None where some rows of two runs of segments are the same."""
        by_rows: dict[tuple[int, int], list[Segment]] = {}
        for s in self.segments:
            if s.start < s.stop and s.bt.numel():
                by_rows.setdefault((s.start, s.stop), []).append(s)
        places = sorted(by_rows)
        if not places or any(stop > start for (_, stop), (start, _) in pairwise(places)):
            return None
        runs = [(*rows, LoraPointers({0: LoraSegments(by_rows[rows])}, 1)) for rows in places]
        return LoraUse(LoraTable(runs), LoraSites((0,)))

    def __len__(self) -> int:
        return len(self.table) // FIELDS


def reference(y: Tensor, x: Tensor, segments: LoraSegments) -> None:
    for s in segments.segments:
        update = (x[s.start : s.stop].float() @ s.a.float().T) @ s.bt.float()
        target = y[s.start : s.stop, s.column : s.column + s.bt.shape[1]]
        target.copy_(target.float() + update)


def lora_pointers(updates: Mapping[int, LoraSegments], sites: int) -> LoraPointers | None:
    """LoraPointers where Triton reads them; None elsewhere, where each linear is given its segments, or where nothing is changed."""
    found = [part for part in updates.values() if len(part)]
    read = all(part.alike and on_gpu(part.segments[0].a) for part in found)
    return LoraPointers(updates, sites) if found and read and _kernel.elsewhere == "triton" else None


def lora(y: Tensor, x: Tensor, segments: LoraSegments | LoraUse) -> None:
    """Add x @ a.T @ bt of each segment to its rows and columns of y, in place; other rows cost nothing.

    y [tokens, out] · x [tokens, in] · ranks differ freely and are never padded; the product in between stays float32, but for
    rows and adapters in bfloat16 on processors that multiply pairs of such, where it is rounded to one.
    A row's result is the same to the bit whether it is a segment alone or one of many in a run. On a GPU, what a LoraTable says
    to this linear may stand for the segments: a captured graph then computes what the table holds when it is replayed.
    """
    if isinstance(segments, LoraUse):
        return _by_table(y, x, segments)
    if not len(segments):
        return None
    if segments.stop > y.shape[0] or segments.columns > y.shape[1] or segments.inputs != x.shape[1]:
        raise ValueError(
            f"segments reach row {segments.stop}, column {segments.columns} and read {segments.inputs} inputs; found y "
            f"{list(y.shape)} and x {list(x.shape)}; build the segments for this batch and this linear"
        )
    if (gpu := _kernel.triton(y, x)) and segments.alike and segments.on_gpu:
        return gpu.lora(y, x, segments.on_gpu)
    if _kernel.run is None or not segments.native or not on_cpu(y, x):
        return reference(y, x, segments)
    _kernel.run(
        y.data_ptr(), x.data_ptr(), segments.address, len(segments), y.stride(0), x.stride(0), x.shape[1],
        DTYPES[x.dtype], DTYPES[y.dtype], DTYPES[segments.dtype],
    )  # fmt: skip
    return None


def _by_table(y: Tensor, x: Tensor, use: LoraUse) -> None:
    sizes = use.table.most(use.sites)
    short = use.tokens is None and use.table.rows > len(x)
    if sizes[PARTS] and (sizes[INPUTS] != x.shape[1] or sizes[REACH] > y.shape[1] or short):
        raise ValueError(
            f"a table of {use.table.rows} rows reads {sizes[INPUTS]} inputs here and reaches column {sizes[REACH]}; found y "
            f"{list(y.shape)} and x {list(x.shape)}; build it for this batch and this model"
        )
    gpu = _kernel.triton(y, x)
    if gpu is None:
        raise ValueError(
            f"a LoraTable asked to update {y.dtype} on {y.device}, which only Triton on a GPU does; give the segments themselves"
        )
    gpu.lora(y, x, use)
