"""GPTQ and AWQ by llm-compressor: codes that are chosen by what the model computes on text."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kvrun.errors import ConfigError, FilesError, Unsupported
from kvrun.quant import choose
from kvrun.quantize import output
from kvrun.quantize.convert import linears
from kvrun.quantize.layout import ignored
from kvrun.spec import Model
from kvrun.weights.checkpoint import Checkpoint
from kvrun.weights.load import Loader
from kvrun.weights.naming import probe
from kvrun.weights.plan import plan_model
from kvrun.weights.split import Split

LIBRARY = "llmcompressor"
GROUP = 128  # inputs that share a scale
DOCUMENTS, TOKENS = 512, 2048  # that are read of a calibration file, and of each document


def calibrate(source: Path, model: Model, out: Path, method: str, group: int | None, calibration: Path) -> None:
    """Write `source` in 4 bits by `method`, "gptq" or "awq". ConfigError without the library, FilesError without text."""
    if find_spec(LIBRARY) is None:
        raise ConfigError(f"--method {method} is llm-compressor's work, which is not installed; run: pip install 'kvrun[quantize]'")
    checkpoint, group = Checkpoint.open(source), group or GROUP
    found = linears(checkpoint, model, group)
    if any(coded.transposed for coded in found.coded.values()):
        raise Unsupported(f"{source} stores linears transposed, which llm-compressor leaves plain; use --method int4")
    output.check(out, source, sum(file.stat().st_size for file in {entry.file for entry in checkpoint.entries.values()}))
    samples = [_encoded(source, text) for text in documents(calibration)]
    print(f"{len(samples)} documents of {calibration}, {sum(map(len, samples))} tokens", file=sys.stderr, flush=True)
    with output.complete(out) as folder:
        plain = ignored((coded.module for coded in found.coded.values()), found.plain)
        _tune(source, folder, _recipe(method, group, plain), samples)
        stored = json.loads((folder / output.CONFIG).read_bytes())["quantization_config"]
        output.write_config(source, folder, stored)
        output.copy_others(source, folder)
        _audit(folder, model, stored)


def documents(file: Path) -> list[str]:
    """The first texts of a calibration file: its lines, or the field "text" of each where its name ends in .jsonl."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:DOCUMENTS]
        texts = [json.loads(line)["text"] for line in lines] if file.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FilesError(
            f'--calibration {file} cannot be read: {error!r}; it holds a document a line, in .jsonl as {{"text": ...}}'
        ) from error
    if not texts:
        raise FilesError(f"--calibration {file} holds no text; a few hundred documents like those that the model will read do well")
    return texts


def _encoded(source: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    return ids[:TOKENS]


def _recipe(method: str, group: int, plain: list[str]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": method == "gptq", "strategy": "group", "group_size": group}
    where = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": plain}
    return [GPTQModifier(**where)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**where)]


def _tune(source: Path, folder: Path, recipe: list[Any], samples: list[list[int]]) -> None:
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():
        # AWQ asks for memory that a device copies from, also where there is no device, and torch refuses that.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    whole = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="cpu")
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)} for ids in samples]
    tuned = oneshot(model=whole, dataset=torch.utils.data.DataLoader(batches, batch_size=None), recipe=recipe)
    tuned.save_pretrained(folder, save_compressed=True)


def _audit(folder: Path, model: Model, stored: dict[str, Any]) -> None:
    """What was written must be what this server reads."""
    checkpoint = Checkpoint.open(folder)
    loader = Loader(checkpoint, probe(model, checkpoint.entries))
    loader.audit(plan_model(model, Split()), choose(None, stored), model.leftovers)
