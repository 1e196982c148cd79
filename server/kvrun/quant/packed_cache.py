"""Weights on disk as the kernels stream them: what one start packed, the next maps into its memory.

A file holds one rank's weights in the order in which the model is built. It is a safetensors file whose metadata say how the
tensors make up the weights; its name is a digest of all that decides them, so that a stale file is never found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kvrun_kernels.dispatch import LIBRARY
from kvrun_kernels.large import LINE, mapped
from kvrun_kernels.linear.op import PackedLinear
from kvrun_kernels.quantized_linear.op import PackedQuantized
from torch import Tensor

from kvrun.errors import FilesError
from kvrun.quant.coded import CodedLinear, Stacked
from kvrun.quant.dense import DenseLinear
from kvrun.quant.format import QuantizedLinear
from kvrun.weights.checkpoint import raw_header
from kvrun.weights.load import torch_dtype

log = logging.getLogger("kvrun.weights")
PACKAGES = (Path(__file__).parents[1], LIBRARY.parent)  # kvrun, kvrun_kernels
CLASSES: dict[str, type] = {c.__name__: c for c in (DenseLinear, CodedLinear, Stacked, PackedLinear, PackedQuantized)}
# safetensors' names of what packed weights are made of.
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


class PackedCache:
    """The weights of one rank, read from its file where that exists, else kept to be written to it."""

    def __init__(self, folder: Path | None, *decisive: object) -> None:
        """`folder` None: nothing is read or kept. `decisive`: all that decides the weights, beside the kernels' own layout."""
        self.file: Path | None = None
        self._stored: Iterator[QuantizedLinear] | None = None
        self._made: list[QuantizedLinear] = []
        if folder is None:
            return
        key = hashlib.sha256(json.dumps([_program(), *map(str, decisive)]).encode()).hexdigest()
        self.file = folder / f"{key[:32]}.safetensors"
        if not self.file.exists():
            return
        try:
            began = time.perf_counter()
            self._stored = iter(_read(self.file))
            log.info("packed weights came from %s in %.1f s", self.file, time.perf_counter() - began)
        except (FilesError, OSError, RuntimeError, ValueError, KeyError) as error:
            log.warning("packed weights in %s cannot be read (%s); they are packed anew", self.file, error)

    @property
    def found(self) -> bool:
        """Whether the weights were there."""
        return self._stored is not None

    def weight(self, make: Callable[[], QuantizedLinear]) -> QuantizedLinear:
        """The next weight of the model: as it was stored, or made now."""
        if self._stored is not None:
            return next(self._stored)
        weight = make()
        if self.file is not None:
            self._made.append(weight)
        return weight

    def keep(self) -> None:
        """Write what was made, whole or not at all; a disk that takes it not costs the next start its time, and nothing else."""
        if self.file is None or self.found:
            return
        unfinished = self.file.with_suffix(f".{os.getpid()}.part")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(unfinished, self._made)
                unfinished.replace(self.file)
            finally:
                unfinished.unlink(missing_ok=True)
            log.info("packed weights are kept in %s", self.file)
        except OSError as error:
            log.warning("packed weights cannot be kept in %s: %s; the next start packs them again", self.file.parent, error)
        self._made.clear()


def _program() -> str:
    """A digest of what packs weights and decides their order: this package and the kernels."""
    files = [file for package in PACKAGES for file in sorted(package.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in (*files, *filter(Path.exists, (LIBRARY,))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(file: Path, weights: list[QuantizedLinear]) -> None:
    tensors: list[Tensor] = []
    shape = [_frozen(weight, tensors) for weight in weights]
    header: dict[str, Any] = {"__metadata__": {"weights": json.dumps(shape)}}
    at = 0
    # Those that fill cache lines first, so that each begins at one.
    laid = sorted(range(len(tensors)), key=lambda number: tensors[number].nbytes % LINE > 0)
    for number in laid:
        tensor = tensors[number]
        header[str(number)] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % LINE)  # tensors begin at cache lines
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for number in laid:
            out.write(tensors[number].contiguous().view(-1).view(torch.uint8).numpy().data)


def _read(file: Path) -> list[QuantizedLinear]:
    raw, held = raw_header(file)
    header = json.loads(raw)
    if max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__") != held:
        raise ValueError(f"{held} bytes of weights are there, its header names others")
    shape = json.loads(header.pop("__metadata__")["weights"])
    arena = mapped(file)[8 + len(raw) :]
    tensors = [
        arena[entry["data_offsets"][0] : entry["data_offsets"][1]].view(torch_dtype(entry["dtype"])).view(entry["shape"])
        for _, entry in sorted(header.items(), key=lambda item: int(item[0]))
    ]
    return [_thawed(item, tensors) for item in shape]


def _frozen(value: Any, tensors: list[Tensor]) -> Any:
    """What json can hold of a weight; its tensors go to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_frozen(item, tensors) for item in value]}
    if type(value).__name__ in CLASSES:
        fields = getattr(type(value), "__slots__", None) or vars(value)
        return {type(value).__name__: {name: _frozen(getattr(value, name), tensors) for name in fields}}
    if not isinstance(value, bool | int | float | str | None):
        raise TypeError(f"a weight holds a {type(value).__name__}, which has no form on disk")
    return value


def _thawed(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind in ("list", "tuple"):
        items = [_thawed(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    made: Any = object.__new__(CLASSES[kind])
    for name, field in content.items():
        setattr(made, name, _thawed(field, tensors))
    return made
