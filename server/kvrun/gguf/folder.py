"""A GGUF file as a model folder: config and tokenizer written out beside links to the weights, once for each file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from kvrun.errors import FilesError
from kvrun.gguf.architecture import architecture_of
from kvrun.gguf.config import METHOD, config_of, tokens
from kvrun.gguf.container import PART, Container, parts_of
from kvrun.gguf.tokenizer import tokenizer_of

SUFFIX = ".gguf"
LAYOUT = 1  # raised when what is written changes, so that folders of earlier versions are left alone


def models_in(folder: Path) -> list[Path]:
    """The models that lie in a folder as GGUF files, a split one by its first part."""
    found = sorted(folder.glob(f"*{SUFFIX}"))
    return [file for file in found if (part := PART.search(file.name)) is None or int(part[1]) == 1]


def holds_gguf(folder: Path) -> bool:
    """Whether GGUF files are a folder's only weights."""
    return bool(models_in(folder)) and not any(folder.glob("*.safetensors"))


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder with no other weights that is not made a model folder yet."""
    return holds_gguf(path) and not _is_prepared(path) if path.is_dir() else path.suffix == SUFFIX


def prepared(path: Path, cache: Path) -> Path:
    """The model folder of a GGUF file, or of the only one in a folder; written under `cache` if it is not there yet.

    FilesError lists the files where a folder has several, and says what is wrong with one that cannot be read.
    """
    file = _only(path) if path.is_dir() else path
    if not file.is_file():
        raise FilesError(f"{file} is not there; name a GGUF file or a folder that holds one")
    parts = {part.name: part.resolve() for part in parts_of(file)}
    identity = [[name, str(part), part.stat().st_size, part.stat().st_mtime_ns] for name, part in parts.items()]
    key = hashlib.sha256(json.dumps([LAYOUT, identity]).encode()).hexdigest()[:16]
    folder = cache / f"{file.stem}-{key}"
    if not (folder / "config.json").is_file():
        try:
            _write(file, parts, folder)
        except OSError as error:
            raise FilesError(
                f"{folder} cannot be written: {error.strerror}; set XDG_CACHE_HOME to a folder that this user may write to"
            ) from error
    return folder


def _only(folder: Path) -> Path:
    found = models_in(folder)
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:20])
    raise FilesError(f"{folder} holds {len(found)} GGUF models: {names}; name one of them, as in {folder / found[0].name}")


def _is_prepared(folder: Path) -> bool:
    try:
        stated = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(stated, dict) and (stated.get("quantization_config") or {}).get("quant_method") == METHOD


def _write(file: Path, parts: dict[str, Path], folder: Path) -> None:
    """Write a folder whole, or not at all."""
    container = Container.open(file)
    architecture = architecture_of(container)
    tokenizer, tokenizer_config = tokenizer_of(container)
    files = {
        "config.json": config_of(container, architecture),
        "generation_config.json": tokens(container),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, part in parts.items():
            (made / name).symlink_to(part)
        for name, fields in files.items():
            (made / name).write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
        made.chmod(0o755)
        os.replace(made, folder)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not (folder / "config.json").is_file():  # another process was first
            raise
