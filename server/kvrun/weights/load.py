"""Hold a checkpoint against a plan, then read it part by part. Whatever is missing, surplus or misshapen is an error by name."""

from __future__ import annotations

import logging
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from kvrun.errors import FilesError, Unsupported
from kvrun.weights.checkpoint import Checkpoint, extent
from kvrun.weights.naming import Naming
from kvrun.weights.plan import Cut, LinearPlan, ModelPlan, Role, TablePlan
from kvrun.weights.reading import CHUNK, Ahead
from kvrun.weights.shard import Stored, Stretch
from kvrun.weights.split import Runs, merge, part, size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHOWN = 10  # names in a message
log = logging.getLogger("kvrun.weights")


class Loader:
    """Reads what plans ask for from one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, naming: Naming) -> None:
        self.checkpoint = checkpoint
        self.naming = naming
        self._names = sorted(checkpoint.entries)
        self._ahead: Ahead[Cut] = Ahead()

    def audit(self, plan: ModelPlan, weights: Stored, leftovers: Iterable[str]) -> None:
        """Refuse a checkpoint that lacks a declared tensor, has one in another shape, or has one that nobody reads.

        `weights` is the weight format in use. Raises FilesError with up to ten names.
        """
        wanted = dict(self._wanted(plan, weights))
        entries, folder = self.checkpoint.entries, self.checkpoint.folder
        missing = [name for name in wanted if name not in entries]
        if missing:
            raise FilesError(f"{folder} lacks {_names(missing)}; its config.json asks for them, so the two do not belong together")
        for name, shape in wanted.items():
            if shape is not None and entries[name].shape != shape:
                found = f"{list(entries[name].shape)}, not {list(shape)} as config.json says"
                raise FilesError(f"{entries[name].file}: tensor {name} is {found}; config and weights do not belong together")
        known = [re.compile(pattern) for pattern in leftovers]
        unread = [name for name in entries if name not in wanted and not any(p.search(name) for p in known)]
        zeros = self._zero_biases(plan, unread)
        if zeros:
            log.info("%s holds biases that its config does not know, all of them zeros; left out are %s", folder, _names(zeros))
        unread = [name for name in unread if name not in zeros]
        if unread:
            raise FilesError(f"{folder} holds {_names(unread)} that nobody would read; serving it without them would be another model")

    def _zero_biases(self, plan: ModelPlan, names: list[str]) -> list[str]:
        """Those of `names` that would be biases of linears without, and hold zeros: some programs write such beside codes."""
        biases = {self.naming(cut.tensor("bias")) for linear in plan.all_linears() if not linear.bias for cut in linear.cuts}
        return [name for name in names if name in biases and not whole(self.checkpoint, name).any()]

    def table(self, plan: TablePlan, dtype: torch.dtype) -> Tensor:
        """This rank's rows of a table or vector."""
        import torch

        name = self.stored(plan)
        columns: tuple[Runs, ...] = tuple(((0, n),) for n in plan.shape[1:])
        out = torch.empty(extent((plan.rows, *columns)), dtype=dtype)
        if plan.rest is None:
            self.checkpoint.read(name, (plan.rows, *columns), out)
            return out
        (start, stop), border = plan.rows[0], plan.shape[0] - plan.rest[1]
        before = max(min(stop, border) - start, 0)
        if before:
            self.checkpoint.read(name, (((start, start + before),), *columns), out[:before])
        if stop > border:
            span = (max(start, border) - border, stop - border)
            self.checkpoint.read(self.naming(plan.rest[0]), ((span,), *columns), out[before:])
        return out

    def rows(self, cuts: Iterable[Cut]) -> Iterator[tuple[Cut, Tensor]]:
        """The plain weights of cuts in turn, some rows of one at a time, [rows, in] in the file's own dtype.

        What comes next is read meanwhile; a tensor is there until the next one is asked for.
        """
        asked = [piece for cut in cuts for piece in self._pieces(cut)]
        yield from zip(asked, self._ahead.read(asked, self._piece), strict=True)

    def _pieces(self, cut: Cut) -> Iterator[Cut]:
        entry = self.checkpoint.entries[self.naming(cut.tensor("weight"))]
        rows, step = size(cut.rows), max(1, CHUNK // (size(cut.cols) * torch_dtype(entry.dtype).itemsize))
        return (replace(cut, rows=part(cut.rows, at, min(at + step, rows))) for at in range(0, rows, step))

    def _piece(self, cut: Cut, place: int) -> Tensor:
        dtype = torch_dtype(self.checkpoint.entries[self.naming(cut.tensor("weight"))].dtype)
        spans = (cut.rows, cut.cols)
        shape = extent(spans)
        out = self._ahead.place(place, math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        self._read(cut, "weight", spans, out)
        return out

    def close(self) -> None:
        """Let go of the files, and of what they were read into."""
        self._ahead.close()
        self.checkpoint.close()

    def linear(self, plan: LinearPlan, axes: Mapping[str, Stretch], cut: Cut) -> dict[str, Tensor]:
        """The tensors of one cut of a linear, in the file's own dtype."""
        return {suffix: self._cut(cut, suffix, axis, plan.transposed) for suffix, axis in axes.items()}

    def held(self, cut: Cut) -> set[str]:
        """The suffixes of a module's tensors that the checkpoint holds: "weight", "bias", "weight.absmax"."""
        prefix = self.naming(cut.tensor("."))[:-1]
        first, found = bisect_left(self._names, prefix), set()
        while first < len(self._names) and self._names[first].startswith(prefix):
            found.add(self._names[first][len(prefix) :])
            first += 1
        return found | ({"weight"} if self.naming(cut.tensor("weight")) in self.checkpoint.entries else set())

    def bias(self, plan: LinearPlan, dtype: torch.dtype) -> Tensor | None:
        """What this rank adds to the linear's output, [out_features]; None when that is nothing."""
        import torch

        if not plan.bias_here:
            return None
        out = torch.empty(plan.out_features, dtype=dtype)
        at = 0
        for cut in plan.cuts:
            (rows,) = extent((cut.rows,))
            self._read(cut, "bias", (cut.rows,), out[at : at + rows])
            at += rows
        return out

    def _cut(self, cut: Cut, suffix: str, axes: Stretch, transposed: bool) -> Tensor:
        import torch

        flip = transposed and suffix == "weight"
        entry = self.checkpoint.entries[self.naming(cut.tensor(suffix))]
        spans = (axes.flipped() if flip else axes).spans(cut, entry.shape[cut.index is not None :])
        out = torch.empty(extent(spans), dtype=torch_dtype(entry.dtype))
        self._read(cut, suffix, spans, out)
        return out.t() if flip else out

    def _read(self, cut: Cut, suffix: str, spans: tuple[Runs, ...], out: Tensor) -> None:
        name = self.naming(cut.tensor(suffix))
        if cut.index is None:
            self.checkpoint.read(name, spans, out)
        else:
            self.checkpoint.read(name, (((cut.index[0], cut.index[0] + 1),), *spans), out.unsqueeze(0))

    def _wanted(self, plan: ModelPlan, weights: Stored) -> Iterator[tuple[str, tuple[int, ...] | None]]:
        """Every tensor some rank reads, with its shape where the plan alone fixes it."""
        ends: dict[TablePlan, Role] = {plan.embed.table: "embedding", plan.head.weight: "head"}
        for table in plan.all_tables():
            if table in ends and self.coded(table, weights, ends[table]):
                yield from self._module(self.end(table), weights, ends[table], transposed=False)
                continue
            rest = 0 if table.rest is None else table.rest[1]
            yield self.stored(table), (table.shape[0] - rest, *table.shape[1:])
            if table.rest is not None:
                yield self.naming(table.rest[0]), (rest, *table.shape[1:])
        for linear in plan.all_linears():
            for cut in linear.cuts:
                yield from self._module(cut, weights, linear.role, transposed=linear.transposed)
                if linear.bias:
                    yield self.naming(cut.tensor("bias")), cut.stacked((cut.out_features,))

    def _module(self, cut: Cut, weights: Stored, role: Role, *, transposed: bool) -> Iterator[tuple[str, tuple[int, ...] | None]]:
        for suffix, axes in weights.of(cut.module, role, self.held(cut)).tensors().items():
            shape = axes.shape(cut.out_features, cut.in_features, transposed=transposed)
            yield self.naming(cut.tensor(suffix)), None if shape is None else cut.stacked(shape)

    def stored(self, plan: TablePlan) -> str:
        """The name under which the checkpoint has a table."""
        return self.naming(plan.tensor if plan.instead is None else self.end(plan).tensor("weight"))

    def end(self, plan: TablePlan) -> Cut:
        """The module that holds a table over the vocabulary: the other of two tied ones where the first is not there."""
        vocabulary, width = plan.shape
        names = [name.removesuffix(".weight") for name in (plan.tensor, plan.instead) if name is not None]
        cuts = [Cut(name, plan.rows, ((0, width),), vocabulary, width) for name in names]
        return next((cut for cut in cuts if self.held(cut) - {"bias"}), cuts[0])

    def coded(self, plan: TablePlan, weights: Stored, role: Role) -> bool:
        """Whether the checkpoint has a table over the vocabulary as something else than plain numbers."""
        cut = self.end(plan)
        return set(weights.of(cut.module, role, self.held(cut)).tensors()) != {"weight"}


def whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """All of a tensor, in the file's own dtype."""
    import torch

    entry = checkpoint.entries[name]
    out = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    checkpoint.read(name, tuple(((0, length),) for length in entry.shape), out)
    return out


def indices(runs: Runs, beside: Tensor | None = None) -> Tensor:
    """The indices that ranges hold, in their order, int64: where `beside` lies, else on the host, where adapters are cut."""
    import torch

    place = torch.device("cpu") if beside is None else beside.device
    return torch.cat([torch.arange(*run, device=place) for run in merge(runs)] or [torch.empty(0, dtype=torch.int64, device=place)])


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of safetensors' own name for it."""
    import torch

    known = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    if name not in known:
        raise Unsupported(f"tensors of type {name} are not read; known are {', '.join(known)}")
    return known[name]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:SHOWN])}{more})"
