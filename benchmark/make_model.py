#!/usr/bin/env python3
"""Write a random Llama checkpoint of a well-known shape, with tokenizer and LoRA adapters, to measure servers with.

The rows of the head that belong to special and byte tokens are zero, so a greedy answer never ends early and never holds
half a character: every server produces exactly the tokens it was asked for.

    make_model.py 1b /tmp/1b --adapters 8
"""

import argparse
import json
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors

SHAPES = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632},
    "160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2048},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
}
VOCABULARY, VOCABULARIES = 32_000, {"8b": 128_256}  # of a shape that is not named
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SILENT = len(SPECIAL) + 256
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-fallback BPE whose words are made up: each is one merge of two halves, so a word is one token."""
    rng = random.Random(0)
    table = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"])}
    merges = []
    halves = ["".join(pair) for pair in ((a, b) for a in "bcdfghjklmnprstvwz" for b in "aeiou")]
    for half in halves:
        table[half] = len(table)
        merges.append((half[0], half[1]))
        table["▁" + half] = len(table)
        merges.append(("▁", half))
    pairs = [(a, b) for a in halves for b in halves]
    rng.shuffle(pairs)
    for a, b in pairs:
        for left in ("▁" + a, a):
            if len(table) < vocabulary and left + b not in table:
                table[left + b] = len(table)
                merges.append((left, b))
    while len(table) < vocabulary:
        table[f"<unused{len(table)}>"] = len(table)
    tok = Tokenizer(models.BPE(vocab=table, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens(SPECIAL)
    tok.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tok


def linear_shapes(shape: dict) -> dict[str, tuple[int, int]]:
    """Module name within a layer -> (outputs, inputs)."""
    h, f = shape["hidden_size"], shape["intermediate_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
    mlp = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def drawn(sizes: dict[str, tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
    """Matrices in bfloat16 from N(0, 0.02), each by its own name and the seed, on all processors."""

    def draw(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.empty(sizes[name]).normal_(0, 0.02, generator=generator).to(torch.bfloat16)

    with ThreadPoolExecutor() as threads:
        return dict(zip(sizes, threads.map(draw, sizes), strict=True))


def write_model(folder: Path, shape: dict, vocabulary: int, context: int, seed: int) -> None:
    """Config, tokenizer and bfloat16 weights drawn from N(0, 0.02)."""
    h, layers = shape["hidden_size"], [f"model.layers.{i}" for i in range(shape["num_hidden_layers"])]
    linears = {f"{layer}.{name}.weight": size for layer in layers for name, size in linear_shapes(shape).items()}
    tensors = drawn({"model.embed_tokens.weight": (vocabulary, h), "lm_head.weight": (vocabulary, h), **linears}, seed)
    tensors["lm_head.weight"][:SILENT] = 0
    norms = ["model.norm", *(f"{layer}.{norm}" for layer in layers for norm in ("input_layernorm", "post_attention_layernorm"))]
    tensors |= {f"{norm}.weight": torch.ones(h, dtype=torch.bfloat16) for norm in norms}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": context,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    words = {f"{kind}_token": token for kind, token in zip(("unk", "bos", "eos", "pad"), SPECIAL)}
    (folder / "config.json").write_text(json.dumps(config | shape | ends, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "chat_template": CHAT} | words, indent=1)
    )
    tokenizer(vocabulary).save(str(folder / "tokenizer.json"))


def write_adapter(folder: Path, shape: dict, rank: int, seed: int) -> None:
    """A PEFT adapter of this rank on every linear of every layer."""
    sizes: dict[str, tuple[int, int]] = {}
    for i in range(shape["num_hidden_layers"]):
        for name, (outputs, inputs) in linear_shapes(shape).items():
            key = f"base_model.model.model.layers.{i}.{name}"
            sizes |= {f"{key}.lora_A.weight": (rank, inputs), f"{key}.lora_B.weight": (outputs, rank)}
    tensors = drawn(sizes, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [name.split(".")[1] for name in linear_shapes(shape)]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="the checkpoint; adapters go to its adapters/")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16], help="taken in turn, adapter by adapter")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    vocabulary = args.vocabulary or VOCABULARIES.get(args.shape, VOCABULARY)
    write_model(args.folder, SHAPES[args.shape], vocabulary, args.context, args.seed)
    for i in range(args.adapters):
        rank = args.ranks[i % len(args.ranks)]
        write_adapter(args.folder / "adapters" / f"lora{i}-r{rank}", SHAPES[args.shape], rank, args.seed + 1 + i)
    print(f"{args.folder}: {args.shape}, {args.adapters} adapters")


if __name__ == "__main__":
    main()
