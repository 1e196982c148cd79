"""A PEFT folder becomes the low-rank changes of this rank's linears, or an error that names what does not fit.

Every tensor of the file is used, or the adapter is refused: one that is served partly is another adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.errors import AdapterError, AdapterNotFound
from kvrun.lora import ends, parameters
from kvrun.lora.ends import EmbeddingDelta
from kvrun.lora.peft import PeftConfig
from kvrun.lora.sites import EmbeddingSite, Site, Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
SHOWN = 10  # tensors in a message
HOST = torch.device("cpu")
EMBEDDING = -1  # where a linear's number stands, the embedding
Home = tuple[int, Source]  # a site and what of it a module feeds


class Coming(Protocol):
    """An adapter on its way: see lora.placed.Coming."""

    def wait(self, site: int) -> None:
        """Have what this thread computes next wait until what linear `site` reads is there."""

    def finish(self) -> None:
        """The same for all of it."""


@dataclass(frozen=True, eq=False)
class Delta:
    """What an adapter adds to columns `column` to `column + n` of one linear: x @ a.T @ bt, the scale folded into bt."""

    a: Tensor  # [rank, in_features of this rank]
    bt: Tensor  # [rank, n]
    column: int


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as this rank holds it."""

    digest: str  # hex SHA-256 over config and weights; equal on all ranks
    deltas: Mapping[int, tuple[Delta, ...]]  # by site
    updates: Mapping[int, ops.LoraSegments]  # the same for no rows yet, laid out for the kernel
    bytes: int  # of this rank, by true ranks
    matched: int  # tensors of the file
    ranks: tuple[int, ...]  # one per changed module
    targets: tuple[str, ...]  # last parts of the changed modules' names, e.g. "q_proj"
    embedding: EmbeddingDelta | None = None
    sites: int = 0  # linears of the model that it was cut for
    pages: int = 0  # adjacent pages that it is placed in before it is used; 0 = it lies where it is used
    coming: Coming | None = None  # what has to be waited for in the step that places it
    pointers: ops.LoraPointers | None = None  # where a GPU finds all updates; None elsewhere, and where there are none

    def carried(self, where: Callable[[Tensor], Tensor]) -> Adapter:
        """The same with every matrix as `where` answers for it; one that many linears share is asked for once."""
        there: dict[Tensor, Tensor] = {}

        def moved(t: Tensor) -> Tensor:
            if t not in there:
                there[t] = where(t)
            return there[t]

        ends = None if self.embedding is None else self.embedding.carried(moved)
        deltas = {site: tuple(Delta(moved(d.a), moved(d.bt), d.column) for d in changed) for site, changed in self.deltas.items()}
        updates = _updates(deltas)
        return replace(self, deltas=deltas, updates=updates, embedding=ends, pointers=ops.lora_pointers(updates, self.sites))

    def matrices(self) -> dict[Tensor, list[int]]:
        """Every matrix with the linears that read it, in the order in which a step computes them; EMBEDDING stands for the embedding."""
        found: dict[Tensor, list[int]] = {}
        for matrix in () if self.embedding is None else self.embedding.matrices:
            found.setdefault(matrix, []).append(EMBEDDING)
        for site in sorted(self.deltas):
            for delta in self.deltas[site]:
                found.setdefault(delta.a, []).append(site)
                found.setdefault(delta.bt, []).append(site)
        return found


def targets(linears: Iterable[Site], embedding: EmbeddingSite | None = None) -> list[str]:
    """The module names that an adapter may target."""
    modules = {name for linear in linears for source in linear.sources for name in _names(source)}
    modules |= {embedding.module} if embedding else set()
    return sorted({_target(module) for module in modules})


def read_adapter(
    folder: str | Path,
    linears: Iterable[Site],
    dtype: torch.dtype,
    embedding: EmbeddingSite | None = None,
    place: torch.device = HOST,
) -> Adapter:
    """Read, check and cut an adapter for this rank's linears and the embedding, on the host. Raises AdapterError or AdapterNotFound.

    place: where the model lies
    """
    config_bytes, weight_bytes = _contents(Path(folder))
    digest = hashlib.sha256(config_bytes)
    digest.update(weight_bytes)
    config = PeftConfig.parse(config_bytes)
    linears = list(linears)
    tensors = ends.renamed(_tensors(weight_bytes, Path(folder) / WEIGHTS), linears)
    tensors = parameters.named(tensors, linears, config)
    matched = len(tensors)
    homes: dict[str, list[Home]] = {}
    copied = any(ends.COPY.match(name) for name in tensors)
    for linear in linears:
        for source in linear.sources:
            for name in _names(source):
                homes.setdefault(name, []).append((linear.site, source))
        if copied:
            ends.leave_out_copies(tensors, linear, dtype)
    changed_rows = None if embedding is None else ends.embedding_delta(tensors, embedding, config, dtype, place)
    pairs = _pairs(tensors, homes)
    _check(pairs, homes, config)

    deltas: dict[int, list[Delta]] = {}
    for module, (a, b) in pairs.items():
        held_a, scaled_b = a.to(dtype, copy=True), b.float() * config.scale(module)
        for site, source in homes[module]:
            if len(source.rows):
                one = (held_a, scaled_b)
                if source.alias is not None and source.alias.parameter == module:
                    one = parameters.of_one(held_a, scaled_b, source.alias, config.rank(module))
                deltas.setdefault(site, []).append(_cut(*one, source, dtype))
    held = [t for changed in deltas.values() for delta in changed for t in (delta.a, delta.bt)]
    if changed_rows is not None:
        held += changed_rows.matrices
    # Checked as held: a narrower dtype may turn a finite weight into an infinite one.
    if not all(bool(torch.isfinite(t).all()) for t in held):
        raise AdapterError(f"not finite in {_name(dtype)}: {_listed(_unsound(tensors) or tensors)}; its training diverged")
    return Adapter(
        digest=digest.hexdigest(),
        deltas={site: tuple(changed) for site, changed in deltas.items()},
        updates=_updates(deltas),
        # Many linears may share one A, whose bytes count once.
        bytes=sum({(store := t.untyped_storage()).data_ptr(): store.nbytes() for t in held}.values()),
        matched=matched,
        ranks=tuple(a.shape[0] for a, _ in pairs.values()) + (() if changed_rows is None else (changed_rows.table.shape[1],)),
        targets=tuple(sorted({_target(module) for module in (*pairs, *([embedding.module] if embedding and changed_rows else ()))})),
        embedding=changed_rows,
        sites=1 + max((linear.site for linear in linears), default=0),
    )


def _contents(folder: Path) -> tuple[bytes, bytes]:
    """Both files, read once: what is hashed is what is served, whatever happens to the folder meanwhile."""
    if not folder.is_dir():
        raise AdapterNotFound(f"adapter folder {folder} does not exist")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            if name == WEIGHTS and pickled:
                raise AdapterError(
                    f"adapter folder {folder} holds pickled weights ({pickled[0]}), which are never read; convert them to {name}"
                )
            raise AdapterNotFound(f"adapter folder {folder} has no {name}; an adapter is a PEFT folder with {CONFIG} and {WEIGHTS}")
    try:
        return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise AdapterNotFound(f"adapter folder {folder} cannot be read: {error}") from error


def _tensors(data: bytes, file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    if data.startswith(b"version https://git-lfs"):
        raise AdapterError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    try:
        tensors = dict(sorted(load(data).items()))
    except Exception as error:  # the library's own error type is not exported by every version
        raise AdapterError(f"{file} is short or corrupt: {error}; download it again") from error
    if not tensors:
        raise AdapterError(f"{file} holds no tensor")
    return tensors


def _pairs(tensors: Mapping[str, Tensor], homes: Mapping[str, object]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module. Raises AdapterError with the tensors that are no A or B of a module of this model."""
    sides: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        match = NAME.match(name)
        if match is None or match["module"] not in homes or match["side"] in sides.get(match["module"], {}):
            strange.append(name)
        else:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    if strange:
        known = ", ".join(sorted({_target(module) for module in homes}))
        raise AdapterError(f"nothing in this model takes {_listed(strange)}; an adapter may change, by one lora_A and lora_B each, {known}")
    lone = [module for module, found in sides.items() if len(found) < 2]
    if lone:
        raise AdapterError(f"without its other half: {_listed(f'{module}.lora_{next(iter(sides[module]))}' for module in lone)}")
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _check(pairs: Mapping[str, tuple[Tensor, Tensor]], homes: Mapping[str, Sequence[tuple[int, Source]]], config: PeftConfig) -> None:
    """Hold shapes against the model and the config. Raises AdapterError."""
    wrong = []
    for module, (a, b) in pairs.items():
        rank = config.rank(module)
        for side, tensor, shape in zip("AB", (a, b), _shapes(module, homes[module][0][1], rank), strict=True):
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                wrong.append(f"{module}.lora_{side} is {_name(tensor.dtype)} {list(tensor.shape)}, not {list(shape)}")
        if rank < 1:
            raise AdapterError(f"adapter_config.json gives {module} rank {rank}; it must be at least 1")
    if wrong:
        raise AdapterError(f"wrong shape: {_listed(wrong)}; the adapter belongs to another model or another config")


def _names(source: Source) -> list[str]:
    """What adapters may call a source; where a parameter of its name holds many matrices, only that."""
    return [source.module] if source.alias is None else sorted({source.module, source.alias.parameter})


def _shapes(name: str, source: Source, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B under one of a source's names."""
    held, out = 1, source.out_features
    if source.alias is not None and source.alias.parameter == name:
        held, out = source.alias.count, source.alias.out_features
    inputs, outputs = (out, source.in_features) if source.flipped else (source.in_features, out)
    return (held * rank, inputs), (outputs, rank * held)


def _cut(a: Tensor, b: Tensor, source: Source, dtype: torch.dtype) -> Delta:
    """Take A's columns and B's rows as the linear's own weight was cut, so that no rank needs another's part."""
    if source.flipped:
        inputs = b if source.cols is None else b.index_select(0, source.cols)
        return Delta(inputs.T.to(dtype).contiguous(), a.index_select(1, source.rows), source.column)
    a = a if source.cols is None else a.index_select(1, source.cols)
    return Delta(a, b.index_select(0, source.rows).T.to(dtype).contiguous(), source.column)


def _updates(deltas: Mapping[int, Iterable[Delta]]) -> dict[int, ops.LoraSegments]:
    return {site: ops.LoraSegments(ops.Segment(0, 0, d.a, d.bt, d.column) for d in changed) for site, changed in deltas.items()}


def _unsound(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _target(module: str) -> str:
    return module.removesuffix(".weight").rsplit(".", 1)[-1]


def _listed(names: Iterable[str]) -> str:
    """Up to ten names, then how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
