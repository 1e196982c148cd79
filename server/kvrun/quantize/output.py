"""The folder that a command writes: whole or not there, with everything of its source that is no weight."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvrun.errors import ConfigError, FilesError
from kvrun.hub import PICKLED, SPARE, WEIGHTS, amount

CONFIG = "config.json"
OTHER_WEIGHTS = (WEIGHTS, f"{WEIGHTS}.index.json", *PICKLED, ".bin.index.json", ".onnx", ".gguf")


def check(out: Path, source: Path, needed: int) -> None:
    """Refuse a folder that holds something, or whose disk has no room for so many bytes. ConfigError or FilesError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and nothing is overwritten; name a folder that is new or empty")
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{out} lies in {source}, whose files are being read; name a folder elsewhere")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if needed * SPARE > free:
        raise FilesError(f"{out} will take {amount(needed * SPARE)}, {amount(free)} are free on its disk; free space there or name another")


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `out` if all goes well and is removed if not."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        umask = os.umask(0)
        os.umask(umask)
        for path in (folder, *folder.iterdir()):
            path.chmod((0o777 if path is folder else 0o666) & ~umask)
        folder.rename(out)
    except OSError as error:
        raise FilesError(f"{out} cannot be written: {error.strerror or error}; check its permissions and the disk") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_others(source: Path, folder: Path) -> None:
    """Every file of a model but its weights and config.json: tokenizer, templates, generation config."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != CONFIG and not file.name.startswith(".") and not file.name.endswith(OTHER_WEIGHTS):
            shutil.copyfile(file, folder / file.name)


def write_config(source: Path, folder: Path, quantization: Mapping[str, Any]) -> None:
    """The source's config.json, with how the weights are stored."""
    fields = json.loads((source / CONFIG).read_bytes())
    (folder / CONFIG).write_text(json.dumps({**fields, "quantization_config": quantization}, indent=2) + "\n")
