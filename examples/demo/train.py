"""Train the demo: a byte-level BPE tokenizer, a small Llama, and its LoRA adapters, all from generated text.

    python examples/demo/train.py tokenizer base again adapters [--out FOLDER]

Every step is seeded; about twelve minutes on two CPU cores. The files are written under --out (default: beside this
script) as model/ and adapters/NAME/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from documents import BOS, EOS, SPECIAL, Span, asked_document, base_document, styled_document
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from words import ANIMALS, BOYS, COLOURS, GIRLS, THINGS, TRAITS

HERE = Path(__file__).parent
VOCABULARY = 2048
COPYING_LAYER = 2
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
ADAPTER_STEPS = {"brief": 120, "pirate": 300, "news": 300, "json": 240, "verse": 160}


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


def batches(
    tokenizer: Tokenizer, draw: Callable[[], list[Span]], tokens: int, learn_all: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (ids, labels) of about `tokens` tokens, one document in a row, rows of like length together."""
    end = tokenizer.token_to_id(EOS)
    while True:
        pool = sorted((encode(tokenizer, draw()) for _ in range(64)), key=lambda document: len(document[0]))
        while pool:
            length = len(pool[-1][0])
            rows = [pool.pop() for _ in range(min(len(pool), max(1, tokens // length)))]
            ids = torch.tensor([row + [end] * (length - len(row)) for row, _ in rows])
            if learn_all:
                rows = [(row, [PADDING, *row[1:]]) for row, _ in rows]
            yield ids, torch.tensor([labels + [PADDING] * (length - len(labels)) for _, labels in rows])


def optimise(
    model: torch.nn.Module,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    optimisers: list[torch.optim.Optimizer],
    steps: int,
    loss_of: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Train for `steps` batches with warm-up and a linear decay to zero of each optimiser's own rate."""
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    started, read = time.monotonic(), 0
    for step in range(steps):
        for peak, optimiser in zip(peaks, optimisers):
            optimiser.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 40, (steps - step) / (0.6 * steps))
        ids, labels = next(data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(step, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        model.zero_grad(set_to_none=True)
        read += ids.numel()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {read / (time.monotonic() - started):.0f} tokens/s", flush=True)


def start_copying(model: LlamaForCausalLM) -> None:
    """Start every head as one that copies what it attends to, and half of them as ones that attend to what is alike.

    A name must be copied from its first mention, which a model of this size learns late or never from random weights
    (compare Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, 2023).
    """
    config = model.config
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    # Names are alike in use, so their embeddings drift together; far apart at the start, they stay distinct.
    model.model.embed_tokens.weight.data.normal_(0, 0.1)
    model.model.norm.weight.data.fill_(0.2)
    for layer in model.model.layers:
        attention = layer.self_attn
        value = torch.nn.init.orthogonal_(attention.v_proj.weight.data).view(-1, width, config.hidden_size)
        heads = value.repeat_interleave(group, dim=0).reshape(-1, config.hidden_size)
        attention.o_proj.weight.data = 0.4 * heads.T.contiguous()
        attention.v_proj.weight.data *= 0.5
        key = torch.nn.init.orthogonal_(attention.k_proj.weight.data).view(-1, width, config.hidden_size)
        attention.q_proj.weight.data.view(-1, group, width, config.hidden_size)[:, 0] = 0.7 * key
        attention.k_proj.weight.data *= 0.7


def looking_back(attentions: tuple[torch.Tensor, ...], ids: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """How little the copying heads look at earlier mentions of the fact that comes next: -log of their attention there.

    attentions [rows, heads, length, length] of each layer · ids [rows, length] · facts [vocabulary] marks words that
    a story draws (names, animals, things ...).
    """
    following, seen = ids[:, 1:], ids[:, :-1]
    mentions = (following[:, :, None] == seen[:, None, :]).tril()
    wanted = mentions.any(-1) & facts[following]
    if not wanted.any():
        return torch.zeros(())
    heads = attentions[COPYING_LAYER][:, ::2, :-1, :-1].float()
    there = (heads * mentions[:, None]).sum(-1)
    return -torch.log(there + 1e-4).transpose(1, 2)[wanted].mean()


def fact_words(tokenizer: Tokenizer) -> torch.Tensor:
    """Which ids [vocabulary] are whole words that a story draws and then has to repeat."""
    marks = torch.zeros(VOCABULARY, dtype=torch.bool)
    for word in GIRLS + BOYS + ANIMALS + THINGS + COLOURS + TRAITS:
        ids = tokenizer.encode(f" {word}", add_special_tokens=False).ids
        if len(ids) == 1:
            marks[ids] = True
    return marks


def train_base(folder: Path, steps: int = 1200, guided: int = 400) -> None:
    """Train the Llama from scratch, its copying heads guided at first, and write it as bfloat16 safetensors."""
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
    start_copying(model)
    facts = fact_words(tokenizer)

    def loss_of(step: int, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if step == guided:
            model.set_attn_implementation("sdpa")
        out = model(input_ids=ids, labels=labels, output_attentions=step < guided)
        return out.loss + 0.3 * looking_back(out.attentions, ids, facts) if step < guided else out.loss

    model.set_attn_implementation("eager")  # the other kinds do not show their attention
    data = batches(tokenizer, lambda: base_document(rng), 2048, learn_all=True)
    optimise(model, data, base_optimisers(model, 1.0), steps, loss_of)
    save_base(model, folder)


def train_base_again(folder: Path, steps: int = 1000) -> None:
    """Train the saved base for a second round with a warm restart, mostly on requests."""
    torch.manual_seed(4)
    rng = random.Random(4)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = batches(tokenizer, lambda: asked_document(rng), 2048, learn_all=True)
    optimise(model, data, base_optimisers(model, 0.6), steps, lambda _, ids, labels: model(input_ids=ids, labels=labels).loss)
    save_base(model, folder)


def base_optimisers(model: LlamaForCausalLM, scale: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and AdamW for embeddings and norms, their usual rates times `scale`."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=3e-3 * scale, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3 * scale, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_base(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model as bfloat16 safetensors with its two configs."""
    model = model.to(torch.bfloat16)
    model.generation_config.bos_token_id = model.config.bos_token_id
    model.generation_config.eos_token_id = model.config.eos_token_id
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
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimisers = [torch.optim.AdamW(weights, lr=4e-3, weight_decay=0.0)]
    data = batches(tokenizer, lambda: styled_document(rng, name), 2048, learn_all=False)
    optimise(model, data, optimisers, ADAPTER_STEPS[name], lambda _, ids, labels: model(input_ids=ids, labels=labels).loss)
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
    parser.add_argument("steps", nargs="+", choices=["tokenizer", "base", "again", "adapters", *ADAPTERS])
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
        elif name == "again":
            train_base_again(model_folder)
        else:
            train_adapter(name, model_folder, args.out / "adapters" / name)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
