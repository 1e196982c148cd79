#!/usr/bin/env python3
"""How near a mixture of experts comes to the machine's read rate while it decodes, in this process and without a server.

    experts.py --experts 8 --top 2 --hidden 1024 --width 2816 --layers 4 --quantize int4

A step must read the matrices of the experts that its rows chose, once each, and everything else. Timed by the processor
time of one thread, which waiting for a turn on a shared machine does not add to; so is the read rate beside it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import kvrun_kernels
import torch
from kvrun.nn.batch import ForwardBatch
from kvrun.nn.build import load_model
from kvrun.nn.loaded import LoadedModel
from kvrun_kernels.bench import Clock, stream_rate

CONTEXT, PAGE = 64, 16


def checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """A random Mixtral of these sizes in bfloat16."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": args.hidden, "intermediate_size": args.width, "num_hidden_layers": args.layers, "vocab_size": 1024}
    heads = {"num_attention_heads": args.hidden // 64, "num_key_value_heads": max(args.hidden // 256, 1)}
    config = MixtralConfig(**sizes, **heads, num_local_experts=args.experts, num_experts_per_tok=args.top, max_position_embeddings=2048)
    torch.manual_seed(0)
    with torch.device("cpu"):
        MixtralForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def decoding(rows: int) -> ForwardBatch:
    """One token for each of `rows` sequences of CONTEXT tokens, other ids in every row."""
    pages = CONTEXT // PAGE
    table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    return ForwardBatch(
        ids=torch.arange(rows) * 7 + 5,
        positions=torch.full((rows,), CONTEXT - 1, dtype=torch.int32),
        query_start=torch.arange(rows + 1, dtype=torch.int32),
        contexts=torch.full((rows,), CONTEXT, dtype=torch.int32),
        page_table=table,
        slots=table[:, -1] * PAGE + PAGE - 1,
        wanted=torch.arange(rows),
        lora=None,
    )


def prompt(tokens: int) -> ForwardBatch:
    """All tokens of one sequence."""
    pages = -(-tokens // PAGE)
    return ForwardBatch(
        ids=torch.arange(tokens) % 1000 + 5,
        positions=torch.arange(tokens, dtype=torch.int32),
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        contexts=torch.tensor([tokens], dtype=torch.int32),
        page_table=torch.arange(pages, dtype=torch.int32).view(1, pages),
        slots=torch.arange(tokens),
        wanted=torch.tensor([tokens - 1]),
        lora=None,
    )


def active(model: LoadedModel, batch: ForwardBatch, pool) -> float:
    """Experts that a step's rows choose, on the average of the layers."""
    from kvrun.nn.mixers import moe

    counts, honest = [], moe.sorted_by

    def counted(choice: torch.Tensor, count: int):
        counts.append(len(choice.unique()))
        return honest(choice, count)

    moe.sorted_by = counted
    try:
        model.forward(batch, pool)
    finally:
        moe.sorted_by = honest
    return sum(counts) / len(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("experts", 8), ("top", 2), ("hidden", 1024), ("width", 2816), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--prompt", type=int, nargs="*", default=[], help="also a prompt of so many tokens")
    parser.add_argument("--quantize", help="make the weights so at load")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kvrun_kernels.set_num_threads(1)
    clock = Clock(1.0, time.thread_time)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), args)
        model = load_model(folder, dtype="bfloat16", quantize=args.quantize)
    experts = [linear.weight.nbytes for linear in model.linears if "experts" in linear.sources[0].module]
    expert = sum(experts) / (args.layers * args.experts)
    rest = model.weight_bytes - sum(experts) - 1024 * args.hidden * 2  # one row of the embedding is read, not all
    rate = stream_rate(clock)
    print(f"read rate {rate / 1e9:.1f} GB/s; an expert is {expert / 1e6:.1f} MB, everything else {rest / 1e6:.1f} MB")
    print("| rows | experts per layer | bytes | ms per step | GB/s | of the read rate |\n|---|---|---|---|---|---|")
    steps = [(str(rows), decoding(rows)) for rows in args.rows] + [(f"prompt of {tokens}", prompt(tokens)) for tokens in args.prompt]
    for rows, batch in steps:
        pool = model.pool(batch.page_table.numel(), PAGE)
        chosen = active(model, batch, pool)
        seconds = clock.seconds_of(lambda batch=batch, pool=pool: model.forward(batch, pool))
        total = rest + args.layers * chosen * expert
        share = total / seconds / rate
        print(f"| {rows} | {chosen:.1f} | {total / 1e6:.0f} MB | {seconds * 1e3:.2f} | {total / seconds / 1e9:.1f} | {share:.0%} |")


if __name__ == "__main__":
    main()
