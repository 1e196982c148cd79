#!/usr/bin/env python3
"""Decode speed of a running kv.run tree beside transformers' `generate` on the same weights, in one run, taking turns.

    make_model.py 1b /tmp/1b && decode.py /tmp/1b --dtype bfloat16 --repeats 3

Prints one row per way of running: tokens per second and milliseconds per token (medians), and the share of the machine's
read bandwidth that one stream reaches: weights are read once per token, so bytes of weights / time per token is the rate.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "server" / "tests" / "e2e"))
from tree import BIN, running, together


def stream_gaps(url: str, prompt: str, tokens: int, adapter: str | None = None) -> list[float]:
    """Seconds between the tokens of one greedy stream, the first excluded."""
    times = []
    parameters = {"max_new_tokens": tokens, **({"adapter_id": adapter} if adapter else {})}
    with httpx.stream("POST", url + "/generate_stream", json={"inputs": prompt, "parameters": parameters}, timeout=600) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line.startswith("data:"):
                times.append(time.perf_counter())
                if "error" in json.loads(line[5:]):
                    raise RuntimeError(line)
    return [b - a for a, b in itertools.pairwise(times)]


def transformers_step(model, tokenizer, prompt: str, tokens: int) -> float:
    """Seconds per token of `generate` with its cache, the prompt's own pass taken off."""
    import torch

    ids = torch.tensor([tokenizer.encode(prompt).ids])
    spans = []
    for count in (1, tokens):
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        spans.append(time.perf_counter() - began)
    return (spans[1] - spans[0]) / (tokens - 1)


def read_bandwidth() -> float:
    """Bytes per second that this machine reads with the kernels' threads."""
    from kvrun_kernels.bench import Clock, stream_rate

    return stream_rate(Clock(budget=1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--quantize", default="", help="what kv.run makes of the weights; transformers takes them as they are")
    args = parser.parse_args()

    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    prompts = [f"{' '.join(['kine', 'bado', 'lemi', 'sotu'] * 8)} {word}" for word in ("ra", "re", "ri", "ro", "ru", "ta", "te", "ti")]
    adapters = sorted((args.model / "adapters").glob("*")) if (args.model / "adapters").exists() else []
    flags = ["--model-id", str(args.model), "--dtype", args.dtype, "--max-total-tokens", "2048"]
    if adapters:
        flags += ["--lora-ids", ";".join(f"{p.name}={p}" for p in adapters)]
    if args.quantize:
        flags += ["--quantize", args.quantize]
    other = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    embedding = other.get_input_embeddings().weight.nbytes
    plain = sum(p.nbytes for p in other.parameters()) - embedding
    facts = subprocess.run(
        [BIN / "text-generation-server", "inspect", args.model, "--dtype", args.dtype, "--quantize", args.quantize, "--json"],
        check=True, capture_output=True,
    )  # fmt: skip
    held = json.loads(facts.stdout)["model"]["rank_weight_bytes"] - embedding
    found: dict[str, list[float]] = {}
    with running(*flags) as tree:
        stream_gaps(tree.url, prompts[0], 4)
        for _ in range(args.repeats):
            for streams in args.streams:
                for kind, names in (("base", [None]), *([(f"{len(adapters)} adapters", [p.name for p in adapters])] if adapters else [])):
                    gaps = together(
                        [lambda i=i, n=names: stream_gaps(tree.url, prompts[i % 8], args.tokens, n[i % len(n)]) for i in range(streams)]
                    )
                    per_step = statistics.median(g for one in gaps for g in one)
                    found.setdefault(f"kv.run, {kind}, {streams} streams", []).append(per_step / streams)
            found.setdefault("transformers generate, 1 stream", []).append(transformers_step(other, tokenizer, prompts[0], args.tokens))
    bandwidth = read_bandwidth()
    name = f"{args.model.name}, {args.dtype}{', ' if args.quantize else ''}{args.quantize}"
    print(f"\n{name}: {held / 1e9:.2f} GB of weights per step; the machine reads {bandwidth / 1e9:.1f} GB/s\n")
    print("| way | tokens/s | ms per token | spread | share of bandwidth |\n|---|---|---|---|---|")
    for way, times in found.items():
        middle = statistics.median(times)
        streams = int(way.split(",")[-1].split()[0])
        share = (plain if way.startswith("transformers") else held) / (middle * streams) / bandwidth
        print(f"| {way} | {1 / middle:.1f} | {1e3 * middle:.1f} | {1e3 * min(times):.1f} to {1e3 * max(times):.1f} | {share:.0%} |")


if __name__ == "__main__":
    main()
