"""Tiny random checkpoints with tokenizers, one row per shape of architecture, made offline by transformers.

Small default weights make a tied model repeat one token for ever, so a greedy test would see nothing: `randomise` draws
weights large enough that answers vary.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

SPECIALS = ("<pad>", "<s>", "</s>")
VOCABULARY = 259  # the specials and 256 bytes
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
LLAMA = {**COMMON, **SHAPE, "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": False}
FALCON = {**COMMON, **SHAPE, "alibi": False, "parallel_attn": True, "bias": False}
GPT2 = {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}


def rope(kind: str, theta: float = 1e4, **numbers: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}


LLAMA3 = rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)

# row -> (transformers' model type, its config)
ROWS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", LLAMA),
    "llama_tied": ("llama", {**LLAMA, **LLAMA3, "tie_word_embeddings": True}),
    "llama_multi_head": ("llama", {**LLAMA, "num_key_value_heads": 4, "head_dim": 24}),
    "llama_biased": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_size": 96, "num_attention_heads": 6}),
    "llama_linear": ("llama", {**LLAMA, **rope("linear", factor=2.0)}),
    "llama_yarn": ("llama", {**LLAMA, **YARN}),
    "llama_dynamic": ("llama", {**LLAMA, **rope("dynamic", factor=2.0)}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2_windowed": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "falcon7b": ("falcon", {**FALCON, "new_decoder_architecture": False, "multi_query": True}),
    "falcon40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon11b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon_rw": (
        "falcon",
        {**FALCON, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2_by_layer": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 80}),
}


def write_checkpoint(row: str, folder: Path, edit: Callable[[dict], dict] = lambda config: config, **save: object) -> Path:
    """Write the row's weights, config and tokenizer into a folder; `edit` rewrites the saved config, `save` goes to save_pretrained."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, fields = ROWS[row]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**fields), dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder, **save)
    write_tokenizer(folder)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    return Path(folder)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw embeddings from N(0, 0.02), matrices from N(0, 6 / sqrt(inputs)), and move every vector by N(0, 0.2)."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * (0.02 if id(parameter) in embeddings else 6 / parameter.shape[-1] ** 0.5))


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: any text comes back exactly, and every id is below 259."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))


def oracle(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """transformers' logits in float32 for each prompt alone, [tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    config = json.loads((Path(folder) / "config.json").read_text())
    # The eager path adds the alibi bias of this family twice.
    attention = "sdpa" if config.get("alibi") else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0] for ids in prompts]
