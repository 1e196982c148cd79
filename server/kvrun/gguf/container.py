"""The container of a GGUF file: what its metadata say and where its tensors lie. Reads headers only, standard library only."""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrun.errors import FilesError, Unsupported

MAGIC = b"GGUF"
VERSIONS = (2, 3)
AGAIN = "download it again"
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
ALIGNMENT = 32  # of tensors' bytes, where the file names no other


@dataclass(frozen=True)
class Type:
    """A type of numbers: so many lie together in a block of so many bytes."""

    name: str
    values: int
    bytes: int


TYPES = {
    0: Type("F32", 1, 4),
    1: Type("F16", 1, 2),
    2: Type("Q4_0", 32, 18),
    3: Type("Q4_1", 32, 20),
    6: Type("Q5_0", 32, 22),
    7: Type("Q5_1", 32, 24),
    8: Type("Q8_0", 32, 34),
    10: Type("Q2_K", 256, 84),
    11: Type("Q3_K", 256, 110),
    12: Type("Q4_K", 256, 144),
    13: Type("Q5_K", 256, 176),
    14: Type("Q6_K", 256, 210),
    20: Type("IQ4_NL", 32, 18),
    23: Type("IQ4_XS", 256, 136),
    30: Type("BF16", 1, 2),
}
PLAIN = ("F32", "F16", "BF16")
# Types that are met in files and not read, by name for the message.
UNREAD = {
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, TEXT, LIST = 6, 8, 9


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; its shape counts numbers, the last dimension is that of its blocks."""

    file: Path
    type: Type
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) // self.type.values * self.type.bytes


@dataclass(frozen=True)
class Container:
    """A model in one file or several parts."""

    file: Path  # the first part
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    headers: tuple[bytes, ...]  # of every part

    @classmethod
    def open(cls, file: Path) -> Container:
        """Read the headers of a file, and of the parts that belong to it. FilesError names a part that is missing, short or corrupt."""
        parts = [_read(part) for part in parts_of(file)]
        tensors: dict[str, Tensor] = {}
        for _, held, _ in parts:
            tensors.update(held)
        return cls(file, parts[0][0], tensors, tuple(header for _, _, header in parts))

    @property
    def architecture(self) -> str:
        """What `general.architecture` says."""
        return str(self.field("general.architecture"))

    def field(self, key: str, default: Any = None) -> Any:
        """A field of the metadata; "{arch}" stands for the architecture's name. FilesError when it is missing and has no default."""
        name = key.replace("{arch}", str(self.metadata.get("general.architecture")))
        value = self.metadata.get(name, default)
        if value is None:
            raise FilesError(f"{self.file}: its metadata lack {name}; convert the model again with a current llama.cpp")
        return value

    def numbers(self, name: str) -> list[float]:
        """A small float32 tensor as numbers: factors of a rotation, for one."""
        tensor = self.tensors[name]
        if tensor.type.name != "F32":
            raise Unsupported(f"{self.file}: {name} is stored as {tensor.type.name}, read is F32; convert the model again")
        with tensor.file.open("rb") as handle:
            handle.seek(tensor.offset)
            return [_meant(value) for value in struct.unpack(f"<{math.prod(tensor.shape)}f", handle.read(tensor.nbytes))]


def parts_of(file: Path) -> list[Path]:
    """The files of a model that was split, in order, or the file alone. FilesError when one is missing."""
    found = PART.search(file.name)
    if found is None:
        return [file]
    count = int(found[2])
    parts = [file.with_name(f"{file.name[: found.start()]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise FilesError(f"{file} is a part of {count}; {', '.join(missing[:3])} is not beside it; download all parts")
    return parts


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], bytes]:
    """Metadata, tensors and the raw header."""
    try:
        with file.open("rb") as handle:
            start = handle.read(8)
            if start == b"version ":  # how a Git LFS pointer begins
                raise FilesError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
            if len(start) < 8 or start[:4] != MAGIC:
                raise FilesError(f"{file} is no GGUF file: it begins with {start[:4]!r}; {AGAIN}")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(file, data).read()
    except OSError as error:
        raise FilesError(f"{file} cannot be read: {error.strerror}; check its path, its permissions and the disk") from error
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise FilesError(f"{file} is short or corrupt: {error!r}; {AGAIN}") from error


class _Header:
    """Walks over the bytes before the tensors."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file, self._data, self._at = file, data, 4

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor], bytes]:
        """See _read."""
        version, tensors, fields = self._take("IQQ")
        if version not in VERSIONS:
            raise Unsupported(f"{self._file} is GGUF of version {version}, read are {VERSIONS}; convert the model again")
        metadata = {}
        for _ in range(fields):
            key, (kind,) = self._text(), self._take("I")
            metadata[key] = self._value(kind)
        infos = [self._info() for _ in range(tensors)]
        step = metadata.get("general.alignment", ALIGNMENT)
        header, first = self._data[: self._at], -(-self._at // step) * step
        held = {name: Tensor(self._file, kind, shape, first + offset) for name, kind, shape, offset in infos}
        end = max((tensor.offset + tensor.nbytes for tensor in held.values()), default=0)
        if end > len(self._data):
            raise FilesError(f"{self._file} is short: its tensors end at byte {end}, it holds {len(self._data)}; {AGAIN}")
        return metadata, held, header

    def _take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += struct.calcsize(f"<{layout}")
        return found

    def _text(self) -> str:
        (length,) = self._take("Q")
        if self._at + length > len(self._data):
            raise ValueError(f"a text of {length} bytes at byte {self._at}")
        text = self._data[self._at : self._at + length]
        self._at += length
        # A vocabulary may hold pieces that are no whole characters.
        return text.decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind == LIST:
            inner, count = self._take("IQ")
            if inner in NUMBERS:
                return list(self._take(f"{count}{NUMBERS[inner]}"))
            return [self._value(inner) for _ in range(count)]
        (value,) = self._take(NUMBERS[kind])
        return _meant(value) if kind == FLOAT32 else value

    def _info(self) -> tuple[str, Type, tuple[int, ...], int]:
        name, (dimensions,) = self._text(), self._take("I")
        shape = self._take(f"{dimensions}Q")[::-1]
        kind, offset = self._take("IQ")
        if kind not in TYPES:
            said = UNREAD.get(kind, f"type {kind}")
            cure = "use a file of another type: Q4_K_M, Q5_K_M, Q6_K, Q8_0 and BF16 are widely published"
            raise Unsupported(f"{self._file}: tensor {name} is stored as {said}, which is not read; {cure}")
        if shape and shape[-1] % TYPES[kind].values:
            raise ValueError(f"{name} has rows of {shape[-1]} numbers in blocks of {TYPES[kind].values}")
        return name, TYPES[kind], tuple(shape), offset


def _meant(value: float) -> float:
    """The shortest decimal that a float32 was rounded from: 1e-5, not 9.99999974737875e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
