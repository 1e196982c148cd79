"""What a model and its adapters will need, from their headers alone: `text-generation-server inspect`.

Reads config.json, adapter_config.json and the headers of safetensors files; never a weight, and imports no torch. The
launcher plans memory with the answer before it starts anything.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvrun import hub, models
from kvrun.config import KV_CACHE_DTYPES
from kvrun.errors import AdapterError, ConfigError, FilesError, KvrunError
from kvrun.spec import Config
from kvrun.weights.checkpoint import Checkpoint
from kvrun.weights.held import weight_bytes
from kvrun.weights.plan import plan_model
from kvrun.weights.split import Split

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PAGE_TOKENS = 16
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model; bytes are those of the fullest rank."""

    folder: str
    architecture: str
    dtype: str  # that the shard will compute in
    parameters: int
    file_bytes: int
    rank_weight_bytes: int
    kv_dtype: str  # that its pages are kept in
    page_bytes: int  # of the KV cache, over all layers
    page_tokens: int
    slot_bytes: int  # of one sequence's recurrent state; 0 in a model without
    max_positions: int | None  # None: no limit of its own


@dataclass(frozen=True)
class AdapterFacts:
    """Sizes of an adapter; bytes are those of its matrices in the model's dtype, whole."""

    name: str
    folder: str
    bytes: int
    parameters: int
    rank_min: int
    rank_max: int


@dataclass(frozen=True)
class Inspection:
    """A model and its adapters."""

    model: ModelFacts
    adapters: list[AdapterFacts]


def inspect(
    folder: Path, adapters: dict[str, Path], dtype: str = "auto", world: int = 1, quantize: str | None = None, kv_dtype: str = "auto"
) -> Inspection:
    """Read all headers. ConfigError or FilesError names the file at fault and the cure."""
    model = inspect_model(folder, dtype, world, quantize, kv_dtype)
    return Inspection(model, [inspect_adapter(name, path, model.dtype) for name, path in adapters.items()])


def inspect_model(folder: Path, dtype: str = "auto", world: int = 1, quantize: str | None = None, kv_dtype: str = "auto") -> ModelFacts:
    """A model folder as `world` ranks would hold it, in the format of `quantize` or its own."""
    folder = hub.local(folder)
    if not folder.is_dir():
        raise FilesError(f"{folder} is not a folder; name the folder that holds config.json and *.safetensors")
    config, model = models.read(folder)
    checkpoint = Checkpoint.open(folder)
    if not (folder / "tokenizer.json").is_file():
        raise FilesError(f"{folder} lacks tokenizer.json; save the tokenizer into it with transformers' `save_pretrained`")
    stored = {STORED[entry.dtype] for entry in checkpoint.entries.values() if entry.dtype in STORED}
    computed = _computed(dtype, config, stored)
    plans = [plan_model(model, Split(rank, world)) for rank in range(world)]
    kept = computed if kv_dtype == "auto" else kv_dtype
    token = max(sum(shape.bytes(kept) for shape in plan.pages) for plan in plans)
    file_bytes = sum(file.stat().st_size for file in {entry.file for entry in checkpoint.entries.values()})
    weights = config.get("quantization_config") or config.get("compression_config")
    rank_bytes = max(weight_bytes(plan, ITEM_BYTES[computed], quantize, weights) for plan in plans)
    return ModelFacts(
        folder=str(folder),
        architecture=config.architecture,
        dtype=computed,
        parameters=plan_model(model, Split()).elements,
        file_bytes=file_bytes,
        rank_weight_bytes=rank_bytes,
        kv_dtype=kept,
        page_bytes=token * PAGE_TOKENS,
        page_tokens=PAGE_TOKENS,
        slot_bytes=max(sum(shape.bytes(ITEM_BYTES[computed]) for shape in plan.slots) for plan in plans),
        max_positions=model.positions or None,
    )


def inspect_adapter(name: str, folder: Path, dtype: str) -> AdapterFacts:
    """A PEFT folder, by the shapes of its matrices."""
    for needed in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / needed).is_file():
            raise FilesError(f"adapter {name}: {folder} lacks {needed}; {_adapter_cure(folder)}")
    try:
        fields = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise FilesError(f"adapter {name}: {folder / ADAPTER_CONFIG} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("r"), int):
        raise ConfigError(f"adapter {name}: {folder / ADAPTER_CONFIG} lacks the field r, its rank; it is no LoRA adapter")
    entries = Checkpoint.open(folder).entries
    ranks = [entry.shape[0] for tensor, entry in entries.items() if ".lora_A." in tensor and len(entry.shape) == 2]
    if not ranks:
        raise FilesError(f"adapter {name}: {folder / ADAPTER_WEIGHTS} holds no lora_A matrix; it is no LoRA adapter")
    numbers = sum(math.prod(entry.shape) for entry in entries.values())
    return AdapterFacts(name, str(folder), numbers * ITEM_BYTES[dtype], numbers, min(ranks), max(ranks))


def _adapter_cure(folder: Path) -> str:
    if any(folder.glob("adapter_model.bin")):
        return "pickled adapters are not read, convert it with peft's `save_pretrained(..., safe_serialization=True)`"
    if (folder / "config.json").is_file():
        return "this is a model's folder, not an adapter's"
    return "name the folder that peft's `save_pretrained` wrote"


def _computed(asked: str, config: Config, stored: set[str]) -> str:
    name = asked if asked != "auto" else str(config.get("dtype") or min(stored, default="float32")).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ConfigError(f"--dtype {asked}: {name} is not served; use one of {', '.join(ITEM_BYTES)}")
    return name


def _adapter_list(text: str) -> dict[str, Path]:
    pairs = [entry.split("=", 1) for entry in text.split(";") if entry.strip()]
    wrong = ["=".join(pair) for pair in pairs if len(pair) != 2]
    if wrong:
        raise ConfigError(f"--lora takes name=folder;name=folder, found {wrong[0]!r}")
    return {name.strip(): Path(folder.strip()) for name, folder in pairs}


def _lines(found: Inspection) -> Iterator[str]:
    parts: list[ModelFacts | AdapterFacts] = [found.model, *found.adapters]
    for facts in parts:
        fields: dict[str, Any] = asdict(facts)
        yield fields.pop("folder")
        yield from (f"  {name.replace('_', ' '):<20} {value}" for name, value in fields.items())


def main(argv: list[str]) -> int:
    """`inspect DIR [--lora name=dir;...] [--dtype D] [--kv-cache-dtype D] [--world-size N] [--quantize F] [--json]`; the exit code."""
    parser = argparse.ArgumentParser(prog="text-generation-server inspect", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="MODEL_DIR", help="a model folder, or a GGUF file")
    parser.add_argument("--lora", default="", help="adapters, as name=folder;name=folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", *ITEM_BYTES])
    parser.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES, help="auto = the model's")
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--quantize", help="the format that the weights will be served in; their own when absent")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    try:
        if args.world_size < 1:
            raise ConfigError(f"--world-size {args.world_size}: there must be one rank at least")
        found = inspect(args.folder, _adapter_list(args.lora), args.dtype, args.world_size, args.quantize, args.kv_cache_dtype)
    except KvrunError as error:
        # An adapter that is named at the start and cannot be served is a file at fault.
        print(error, file=sys.stderr)
        return FilesError.exit_code if isinstance(error, AdapterError) else error.exit_code
    print(json.dumps(asdict(found)) if args.json else "\n".join(_lines(found)))
    return 0
