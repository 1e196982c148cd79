"""A folder of weights, opened by its headers; tensors are read when asked for, and only the parts asked for.

Never unpickles anything. Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrun.errors import FilesError
from kvrun.gguf import holds_gguf
from kvrun.weights.split import Runs, size

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
AGAIN = "download it again"
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I64": 64, "I32": 32}
BITS |= {"I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8}
LONGEST_HEADER = 100 << 20  # the format's own limit; a larger length means the file is something else


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is, from a file's header."""

    file: Path
    dtype: str  # the format's own name, "BF16"
    shape: tuple[int, ...]
    begin: int = 0  # the first of its bytes in the file


class Checkpoint:
    """The tensors of a model folder by name."""

    def __init__(self, folder: Path, entries: dict[str, Entry], digest: str) -> None:
        self.folder = folder
        self.entries = entries
        self.digest = digest  # hex SHA-256 over config.json and every weight file's header and size
        self._handles: dict[Path, Any] = {}

    @property
    def stamp(self) -> tuple[str, ...]:
        """What changes when a weight file is written anew, even if its header stays: the digest, and each file's size and time."""
        stats = ((file, file.stat()) for file in sorted({entry.file for entry in self.entries.values()}))
        return (self.digest, *(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats))

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers. FilesError names a file that is missing, short, corrupt or a pointer, and the cure."""
        folder = Path(folder)
        if holds_gguf(folder):
            from kvrun.weights.gguf import open_gguf

            return open_gguf(folder)
        entries: dict[str, Entry] = {}
        digest = hashlib.sha256((folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b"")
        for file in _files(folder):
            header, tensors = _header(file)
            digest.update(header)
            digest.update(file.stat().st_size.to_bytes(8, "little"))
            for name, entry in tensors.items():
                if name in entries:
                    raise FilesError(f"tensor {name} lies in both {entries[name].file} and {file}; keep one set of weights in the folder")
                entries[name] = entry
        return cls(folder, entries, digest.hexdigest())

    def read(self, name: str, spans: tuple[Runs, ...], out: Tensor) -> None:
        """Copy the product of `spans`, one list of ranges per dimension, into `out`, converting to its dtype."""
        import torch

        entry = self.entries[name]
        try:
            with torch.device("cpu"):  # where files are read, wherever `out` lies
                _copy(self._stored(name), spans, out, ())
        except (OSError, RuntimeError) as error:
            raise FilesError(f"{entry.file}: tensor {name} cannot be read: {error}; {AGAIN}") from error

    def close(self) -> None:
        """Let go of the files."""
        self._handles.clear()  # a file closes when nobody holds it

    def _stored(self, name: str) -> Any:
        """What copies a part of a tensor by its ranges, one slice for each dimension."""
        from kvrun.weights.load import torch_dtype
        from kvrun.weights.reading import FileTensor

        entry = self.entries[name]
        return FileTensor(self._open(entry.file), entry.begin, entry.shape, torch_dtype(entry.dtype))

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles.setdefault(file, file.open("rb", buffering=0))  # another thread may have come first
        return self._handles[file]


def _copy(source: Any, spans: tuple[Runs, ...], out: Tensor, chosen: tuple[slice, ...]) -> None:
    """Copy block by block: one range of every dimension at a time."""
    dim = len(chosen)
    if dim == len(spans):
        source.copy(chosen, out)
        return
    at = 0
    for start, stop in spans[dim]:
        block = out.narrow(dim, at, stop - start)
        _copy(source, spans, block, (*chosen, slice(start, stop)))
        at += stop - start


def extent(spans: tuple[Runs, ...]) -> tuple[int, ...]:
    """The shape of what `spans` select."""
    return tuple(size(runs) for runs in spans)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FilesError(f"{index} is not an index of weights: {error!r}; {AGAIN}") from error
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise FilesError(f"{index} names {outside[0]}, which is not a file beside it; {AGAIN}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FilesError(f"{folder} lacks {', '.join(missing[:10])}, which {INDEX} names; download the missing files")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    loose = sorted(folder.glob("*.safetensors"))
    if loose:
        return loose
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        raise FilesError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}); convert them to safetensors, pickles are not read"
        )
    raise FilesError(f"{folder} holds no *.safetensors; a model folder holds config.json, *.safetensors and tokenizer.json")


def _header(file: Path) -> tuple[bytes, dict[str, Entry]]:
    """The raw header of a safetensors file and its tensors, every offset checked against the file's true size."""
    raw, held = raw_header(file)
    try:
        stated = {name: value for name, value in json.loads(raw).items() if name != "__metadata__"}
        offsets = {name: tuple(value["data_offsets"]) for name, value in stated.items()}
        data = 8 + len(raw)
        entries = {name: Entry(file, value["dtype"], tuple(value["shape"]), data + offsets[name][0]) for name, value in stated.items()}
        for name, entry in entries.items():
            begin, end = offsets[name]
            if entry.dtype in BITS and (end - begin) * 8 != math.prod(entry.shape) * BITS[entry.dtype]:
                raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)} in {end - begin} bytes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FilesError(f"{file} is corrupt: {error}; {AGAIN}") from error
    end = max((end for _, end in offsets.values()), default=0)
    if end > held:
        raise FilesError(f"{file} is short: its tensors take {end} bytes, it holds {held}; {AGAIN}")
    return raw, entries


def raw_header(file: Path) -> tuple[bytes, int]:
    """The bytes of a file's header, and how many bytes follow it."""
    try:
        total = file.stat().st_size
        with file.open("rb") as handle:
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            raw = handle.read(min(length, LONGEST_HEADER, total))
    except OSError as error:
        raise FilesError(f"{file} cannot be read: {error.strerror}; check its permissions and the disk") from error
    if start == b"version ":  # how a Git LFS pointer begins
        raise FilesError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if len(start) < 8 or length > total - 8:
        raise FilesError(f"{file} is short or no safetensors file: it has {total} bytes; {AGAIN}")
    if length > LONGEST_HEADER:
        raise FilesError(f"{file} is no safetensors file: its header would take {length} bytes; {AGAIN}")
    return raw, total - 8 - length
