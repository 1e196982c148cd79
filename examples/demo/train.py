"""Train the demo: a byte-level BPE tokenizer, a small Llama, and its LoRA adapters, all from generated text.

    python examples/demo/train.py tokenizer base adapters [--out FOLDER]

Every step is seeded; about twelve minutes on two CPU cores. The files are written under --out (default: beside this
script) as model/ and adapters/NAME/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from documents import BOS, EOS, SPECIAL, Span, base_document, styled_document
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = 2048
PADDING = -100  # label of a token that is read but not learned

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Roles are system, user and assistant.') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# Ranks, targets and scalings differ on purpose: they are what a server has to mix in one batch.
ADAPTERS: dict[str, LoraConfig] = {
    "brief": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "pirate": LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION),
    "news": LoraConfig(
        r=8, lora_alpha=16, target_modules=ATTENTION + MLP,
        rank_pattern={"q_proj": 4, "down_proj": 16}, alpha_pattern={"down_proj": 32},
    ),
    "json": LoraConfig(r=16, lora_alpha=16, use_rslora=True, target_modules=ATTENTION + MLP),
    "verse": LoraConfig(r=32, lora_alpha=32, target_modules=MLP),
}  # fmt: skip
ADAPTER_STEPS = {"brief": 220, "pirate": 220, "news": 160, "json": 200, "verse": 200}


def train_tokenizer(folder: Path, documents: int = 12000) -> None:
    """Train the byte-level BPE and write the tokenizer files with the chat template."""
    rng = random.Random(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("".join(text for text, _ in base_document(rng)) for _ in range(documents))
    tokenizer.train_from_iterator((strip_special(text) for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS,
        clean_up_tokenization_spaces=False, model_max_length=2048, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)
    # The name that every release of transformers knows, not only the one that trained it.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def strip_special(text: str) -> str:
    """Text without the special tokens, so that no merge is learned inside their spelling."""
    for token in SPECIAL:
        text = text.replace(token, "\n")
    return text


def encode(tokenizer: Tokenizer, document: list[Span]) -> tuple[list[int], list[int]]:
    """Ids and labels of one document, <s> in front."""
    ids, labels = [tokenizer.token_to_id(BOS)], [PADDING]
    for text, learn in document:
        span = tokenizer.encode(text, add_special_tokens=False).ids
        ids += span
        labels += span if learn else [PADDING] * len(span)
    return ids, labels


def windows(tokenizer: Tokenizer, draw: Callable[[], list[Span]], window: int, learn_all: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Endless windows of whole documents, padded at the end; a document is never cut."""
    end = tokenizer.token_to_id(EOS)
    ids: list[int] = []
    labels: list[int] = []
    while True:
        next_ids, next_labels = encode(tokenizer, draw())
        if learn_all:
            next_labels = [PADDING, *next_ids[1:]]
        if len(next_ids) > window:
            continue
        if len(ids) + len(next_ids) > window:
            pad = window - len(ids)
            yield ids + [end] * pad, labels + [PADDING] * pad
            ids, labels = [], []
        ids, labels = ids + next_ids, labels + next_labels


def optimise(
    model: torch.nn.Module,
    batches: Iterator[tuple[list[int], list[int]]],
    *,
    steps: int,
    batch: int,
    rate: float,
    first: int = 0,
    total: int | None = None,
    optimiser: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Run AdamW with warm-up and cosine decay; `first` and `total` place these steps in a longer schedule."""
    total = total or steps
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = optimiser or torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    started, read = time.monotonic(), 0
    for step in range(first, first + steps):
        warm = min(1.0, (step + 1) / 60)
        optimiser.param_groups[0]["lr"] = rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * step / total)) / 2)
        rows = [next(batches) for _ in range(batch)]
        ids, labels = (torch.tensor([row[part] for row in rows]) for part in (0, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        read += ids.numel()
        if step % 50 == 0 or step == first + steps - 1:
            print(f"step {step} loss {loss.item():.3f} {read / (time.monotonic() - started):.0f} tokens/s", flush=True)
    return optimiser


def train_base(folder: Path) -> None:
    """Train the Llama from scratch and write it as bfloat16 safetensors."""
    torch.manual_seed(2)
    rng = random.Random(2)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=640, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=bos, eos_token_id=eos, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    total, long_steps = 1500, 150
    short = windows(tokenizer, lambda: base_document(rng), 512, learn_all=True)
    optimiser = optimise(model, short, steps=total - long_steps, batch=5, rate=3e-3, total=total)
    # The last steps read longer windows, so that positions up to 1024 are known.
    long = windows(tokenizer, lambda: base_document(rng), 1024, learn_all=True)
    optimise(model, long, steps=long_steps, batch=3, rate=3e-3, first=total - long_steps, total=total, optimiser=optimiser)
    model = model.to(torch.bfloat16)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = bos, eos
    model.save_pretrained(folder)


def train_adapter(name: str, model_folder: Path, folder: Path) -> None:
    """Train one adapter on the frozen base and write it as a PEFT folder with bfloat16 safetensors."""
    torch.manual_seed(3)
    rng = random.Random(f"adapter {name}")
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    config = ADAPTERS[name]
    config.task_type, config.lora_dropout, config.base_model_name_or_path = "CAUSAL_LM", 0.0, "kvrun/demo"
    base = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(base, config)
    batches = windows(tokenizer, lambda: styled_document(rng, name), 512, learn_all=False)
    optimise(model, batches, steps=ADAPTER_STEPS[name], batch=4, rate=4e-3)
    save_adapter(model, folder)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the PEFT folder without the generated model card, its settings sorted so that a rerun is the same file."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = "kvrun/demo"
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Run the asked steps in order and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="+", choices=["tokenizer", "base", "adapters", *ADAPTERS])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--threads", type=int, default=2, help="use 1 when another program keeps a core busy")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(args.threads)
    names = [n for step in args.steps for n in (ADAPTERS if step == "adapters" else [step])]
    for name in names:
        started = time.monotonic()
        model_folder = args.out / "model"
        if name == "tokenizer":
            train_tokenizer(model_folder)
        elif name == "base":
            train_base(model_folder)
        else:
            train_adapter(name, model_folder, args.out / "adapters" / name)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
