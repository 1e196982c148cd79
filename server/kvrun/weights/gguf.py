"""The tensors of a GGUF file as those of a checkpoint, by the names and in the order that the published checkpoint has them.

A matrix is called by its type, "model.layers.0.mlp.up_proj.Q4_K": outputs by blocks by the bytes of a block, which its format
reads. All else is plain numbers. Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrun.errors import FilesError
from kvrun.gguf import PLAIN, Container, Place, architecture_of, models_in, places, rows
from kvrun.weights.checkpoint import AGAIN, Checkpoint, Entry

if TYPE_CHECKING:
    from torch import Tensor


def open_gguf(folder: Path) -> Checkpoint:
    """Open the model in a prepared folder by its headers."""
    (file,) = models_in(folder)
    container = Container.open(file)
    stated = (folder / "config.json").read_bytes()
    config = json.loads(stated)
    held = places(container, architecture_of(container))
    for name, place in held.items():
        if not place.matrix and place.tensor.type.name not in PLAIN:
            raise FilesError(f"{file}: {name} is stored as {place.tensor.type.name}, read is {', '.join(PLAIN)}; convert the model again")
    digest = hashlib.sha256(stated)
    for header in container.headers:
        digest.update(header)
    for part in sorted({tensor.file for tensor in container.tensors.values()}):
        digest.update(part.stat().st_size.to_bytes(8, "little"))
    named = {name.removesuffix("weight") + place.tensor.type.name if place.matrix else name: place for name, place in held.items()}
    return _Blocks(folder, {name: _entry(place) for name, place in named.items()}, digest.hexdigest(), named, config)


class _Blocks(Checkpoint):
    """A checkpoint over a file of blocks that is mapped into memory."""

    def __init__(self, folder: Path, entries: dict[str, Entry], digest: str, places: dict[str, Place], config: dict[str, Any]) -> None:
        super().__init__(folder, entries, digest)
        self._places, self._config = places, config

    def _stored(self, name: str) -> Any:
        place = self._places[name]
        tensor = place.tensor
        data = self._open(tensor.file)
        if len(data) < tensor.offset + tensor.nbytes:
            raise FilesError(f"{tensor.file} has become shorter while it was read; {AGAIN}")
        held = data[tensor.offset : tensor.offset + tensor.nbytes]
        shape = self.entries[name].shape
        if place.index is not None:
            each = tensor.nbytes // tensor.shape[0]
            held = held[place.index * each : (place.index + 1) * each]
        if not place.matrix:
            from kvrun.weights.load import torch_dtype

            held = held.view(torch_dtype(tensor.type.name))
        order = None if place.order is None else rows(place.order, self._config, shape[0])
        return _Part(held.view(shape), order, place.more)

    def _open(self, file: Path) -> Tensor:
        import torch

        if file not in self._handles:
            self._handles[file] = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
        return self._handles[file]


@dataclass(frozen=True)
class _Part:
    """A tensor as it lies in the file."""

    held: Tensor
    order: list[int] | None  # the row of the file for each row of the checkpoint
    more: float

    def copy(self, chosen: tuple[slice, ...], out: Tensor) -> None:
        """See Stored."""
        if self.order is None:
            found = self.held[chosen]
        else:
            whole = slice(None), *chosen[1:]
            found = self.held[self.order[chosen[0]]][whole]
        out.copy_(found - self.more if self.more else found)


def _entry(place: Place) -> Entry:
    kind = place.tensor.type
    if not place.matrix:
        return Entry(place.tensor.file, kind.name, place.shape)
    blocks = (*place.shape[:-1], place.shape[-1] // kind.values, kind.bytes)
    return Entry(place.tensor.file, "U8", blocks)
