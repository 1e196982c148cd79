"""T5 with its first feed-forward, and Flan-T5 with a head of its own and without."""

import json
from pathlib import Path

import torch

from tiny.row import COMMON, SOURCE, VOCABULARY, Row, Tensors

T5 = {
    **COMMON,
    "d_model": 48,
    "d_kv": 20,  # times heads, not the model's width
    "d_ff": 80,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 40,
    "decoder_start_token_id": 0,
}
FLAN = {**T5, "feed_forward_proj": "gated-gelu"}


def after_source(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits of an answer to `SOURCE`."""
    return model(input_ids=torch.tensor([SOURCE]), decoder_input_ids=ids).logits


def untie(folder: Path) -> None:
    """Give the checkpoint a head of its own, as published ones have it and transformers no longer saves."""
    from safetensors.torch import load_file, save_file

    tensors: Tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 0.1 * torch.randn(VOCABULARY, T5["d_model"], generator=torch.Generator().manual_seed(9))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def placed(model: torch.nn.Module) -> None:
    """Biases of positions large enough to be seen beside scores."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter *= 50


def scaled(model: torch.nn.Module) -> None:
    """Scores small enough that rounding stays rounding, since nothing scales them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("Attention.q.weight"):
                parameter *= 0.1
            if name.endswith("layer.0.layer_norm.weight"):
                parameter *= 0.4


def row(config: dict, **more: object) -> Row:
    """A row whose prompts are answers to one source."""
    return Row(
        "t5",
        config,
        logits=after_source,
        architecture="T5ForConditionalGeneration",
        auto="AutoModelForSeq2SeqLM",
        adjust=placed,
        settle=scaled,
        **more,
    )


ROWS = {"t5": row(T5, seed=1), "flan_t5": row(FLAN, seed=372), "flan_t5_untied": row(FLAN, seed=372, prepare=untie)}
