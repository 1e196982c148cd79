"""Plain weights made codes one by one: what becomes of each tensor of a checkpoint, then the reading and the writing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvrun.errors import FilesError, Unsupported
from kvrun.quant import Dense
from kvrun.quantize.layout import Layout, Tensors
from kvrun.spec import Model
from kvrun.weights.checkpoint import BITS, INDEX, SINGLE, Checkpoint, Entry
from kvrun.weights.load import Loader, whole
from kvrun.weights.naming import probe
from kvrun.weights.plan import plan_model
from kvrun.weights.split import Split

SHARD_BYTES = 2 << 30  # of a weight file, and about what is held in memory
Progress = Callable[[int], None]  # told of bytes read


@dataclass(frozen=True)
class Coded:
    """A module whose weight becomes codes."""

    module: str  # as the checkpoint calls it
    transposed: bool  # stored in x out


@dataclass
class Modules:
    """The linears of a checkpoint by its names: which become codes, and which stay plain."""

    coded: dict[str, Coded] = field(default_factory=dict)  # by the name of the weight's tensor
    plain: list[str] = field(default_factory=list)
    uneven: list[str] = field(default_factory=list)  # of the plain ones, those whose inputs have no place in the layout


class Conversion:
    """A checkpoint and how its linears will be stored. Everything that can be wrong with it is said when it is made."""

    def __init__(self, checkpoint: Checkpoint, model: Model, layout: Layout) -> None:
        """Raises FilesError where weights and config do not belong together, Unsupported where the layout has no place for one."""
        self._checkpoint, self._layout = checkpoint, layout
        self.modules = linears(checkpoint, model, layout.per)
        self._sizes = {name: self._bytes(name, entry) for name, entry in checkpoint.entries.items()}

    @property
    def read_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(_entry_bytes(entry) for entry in self._checkpoint.entries.values())

    @property
    def written_bytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(self._sizes.values())

    def write(self, folder: Path, progress: Progress, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the weights into a folder, one file after the other, each of at most `shard_bytes` unless one tensor takes more."""
        shards = list(self._shards(shard_bytes))
        names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        places: dict[str, str] = {}
        for file, sources in zip(names, shards, strict=True):
            tensors: Tensors = {}
            for source in sources:
                tensors |= self._written(source)
                progress(_entry_bytes(self._checkpoint.entries[source]))
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.written_bytes}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _shards(self, most: int) -> Iterator[list[str]]:
        shard: list[str] = []
        held = 0
        for name, size in self._sizes.items():
            if shard and held + size > most:
                yield shard
                shard, held = [], 0
            shard.append(name)
            held += size
        yield shard

    def _bytes(self, name: str, entry: Entry) -> int:
        coded = self.modules.coded.get(name)
        return _entry_bytes(entry) if coded is None else self._coded_bytes(*(reversed(entry.shape) if coded.transposed else entry.shape))

    @cache  # noqa: B019  (one conversion a process)
    def _coded_bytes(self, out: int, inputs: int) -> int:
        return sum(tensor.nbytes for tensor in self._layout.tensors(torch.empty((out, inputs), device="meta")).values())

    def _written(self, name: str) -> Tensors:
        """What is stored for a tensor of the source, by name."""
        weight, coded = whole(self._checkpoint, name), self.modules.coded.get(name)
        if coded is None:
            return {name: weight}
        tensors = self._layout.tensors(weight.T if coded.transposed else weight)
        if coded.transposed and "weight" in tensors:  # a tensor of this name keeps the way it lies in plain checkpoints
            tensors["weight"] = tensors["weight"].T.contiguous()
        return {f"{coded.module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def linears(checkpoint: Checkpoint, model: Model, per: int) -> Modules:
    """The linears of a plain checkpoint; those whose inputs are no multiple of `per` stay plain. Raises as Conversion does."""
    loader = Loader(checkpoint, probe(model, checkpoint.entries))
    plan = plan_model(model, Split())
    loader.audit(plan, Dense(), model.leftovers)
    ends = [end.rest[0] for end in (plan.embed.table, plan.head.weight) if end.rest is not None]
    found = Modules(plain=[model.decoder.head.name, *(name.removesuffix(".weight") for name in ends)])
    for linear in plan.all_linears():
        for cut in linear.cuts:
            name = loader.naming(cut.tensor("weight"))
            module = name.removesuffix(".weight")
            if linear.role not in ("column", "row"):
                # Classes of today may know it by the name that adapters know.
                found.plain += [module] if cut.alias is None else [module, cut.alias.parameter.removesuffix(".weight")]
            elif cut.bare:
                raise Unsupported(
                    f"{checkpoint.folder}: {name} holds several experts, and compressed-tensors stores codes for one linear at a "
                    "time; serve the plain checkpoint with --quantize, which makes the same codes while it loads"
                )
            elif cut.in_features % per:
                found.plain.append(module)
                found.uneven.append(module)
            else:
                found.coded[name] = Coded(module, linear.transposed)
    if not found.coded:
        raise Unsupported(f"{checkpoint.folder}: no linear has a multiple of {per} inputs, so nothing would become smaller")
    return found


def _entry_bytes(entry: Entry) -> int:
    if entry.dtype not in BITS:
        raise FilesError(f"{entry.file} holds tensors of type {entry.dtype}, which are not known here; known are {', '.join(BITS)}")
    elements = 1
    for length in entry.shape:
        elements *= length
    return elements * BITS[entry.dtype] // 8
