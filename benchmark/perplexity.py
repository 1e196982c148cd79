#!/usr/bin/env python3
"""What each weight format costs the demo model: perplexity of held-out text, beside bfloat16.

    perplexity.py [--documents 200] [--stored FOLDER ...]

Without --stored it is every format that is made at load, and the integer ones with activations of 8 bits too; with it, folders that
`text-generation-server quantize` wrote of the demo model. The text comes from the
demo's own grammar with a seed that its training never used.
"""

import argparse
import math
import random
import sys
from pathlib import Path

import torch
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.build import load_model
from kvrun.nn.loaded import LoadedModel
from kvrun.quant import registry
from tokenizers import Tokenizer

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
SEED, PAGE = 990_017, 16


def held_out(count: int) -> list[list[int]]:
    """Token ids of `count` documents."""
    sys.path.insert(0, str(DEMO))
    from documents import BOS, base_document

    tokenizer, rng = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json")), random.Random(SEED)
    texts = ["".join(text for text, _ in base_document(rng)) for _ in range(count)]
    return [tokenizer.encode(BOS + text, add_special_tokens=False).ids for text in texts]


def surprise(model: LoadedModel, ids: list[int]) -> float:
    """The sum of -log p over every token of a document after its first."""
    tokens = len(ids)
    pages = -(-tokens // PAGE)
    kv = model.pool(pages, PAGE)
    at = torch.arange(tokens, dtype=torch.int32)
    batch = ForwardBatch(
        ids=torch.tensor(ids),
        positions=at,
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        contexts=torch.tensor([tokens], dtype=torch.int32),
        page_table=torch.arange(pages, dtype=torch.int32)[None],
        slots=at,
        wanted=torch.arange(tokens - 1),
        lora=None,
    )
    logits = model.forward(batch, kv)
    assert logits is not None, "this process is rank 0"
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))


def main() -> None:
    """Print a table, the formats in the order of their names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--stored", type=Path, nargs="+", default=[], help="quantized versions of the demo model")
    args = parser.parse_args()
    documents = held_out(args.documents)
    tokens = sum(len(ids) - 1 for ids in documents)
    print(f"{len(documents)} documents, {tokens} tokens\n\n| weights | MB held | perplexity | beside bfloat16 |\n|---|---|---|---|")
    base = 0.0
    made = [] if args.stored else [(name, DEMO / "model", name, "auto") for name in registry.names()[1]]
    made += [] if args.stored else [(f"{name}, activations of 8 bits", DEMO / "model", name, "int8") for name in ("int8", "int4")]
    stored = [(folder.name, folder, None, "auto") for folder in args.stored]
    for name, folder, quantize, activations in (("bfloat16", DEMO / "model", None, "auto"), *made, *stored):
        model = load_model(folder, dtype="bfloat16", quantize=quantize, activation_dtype=activations)
        perplexity = math.exp(sum(surprise(model, ids) for ids in documents) / tokens)
        base = base or perplexity
        print(f"| {name} | {model.weight_bytes / 1e6:.2f} | {perplexity:.4f} | {perplexity / base:.4f} |", flush=True)


if __name__ == "__main__":
    main()
