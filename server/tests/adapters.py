"""PEFT adapters for tiny checkpoints, and what peft itself answers with them."""

import json
import re
from pathlib import Path

import torch
from tiny import oracle_model, row_of

# name -> (row of tiny.ROWS, LoraConfig fields)
ALL_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict]] = {
    "rank1": ("llama", {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}),
    "rank3": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "o_proj"]}),
    "rank8": ("llama", {"r": 8, "lora_alpha": 16, "target_modules": ALL_LLAMA}),
    "rank16": ("llama", {"r": 16, "lora_alpha": 16, "target_modules": ["gate_proj", "down_proj"]}),
    "rank64": ("llama", {"r": 64, "lora_alpha": 32, "target_modules": ALL_LLAMA}),
    "rslora": ("llama", {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ALL_LLAMA,
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 16, ".*gate_proj": 3},
        },
    ),
    "layers": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "falcon": ("falcon40b", {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}),
    "falcon_mqa": ("falcon7b", {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value", "dense"]}),
    "gpt2": ("gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


def write_adapter(folder: Path, checkpoint: Path, seed: int = 0, **config: object) -> Path:
    """Save a random PEFT adapter for the model in `checkpoint`, strong enough to change its answers."""
    from peft import LoraConfig, get_peft_model

    base = oracle_model(checkpoint)
    if config.get("target_modules") == "everything":
        config["target_modules"] = _everything(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    model.unload()
    return folder


def likeliest(checkpoint: Path, adapter: Path | None, sequences: list[tuple[list[int], list[int]]]) -> list[list[int]]:
    """For each (prompt, answer), what transformers, with peft's adapter if one is given, likes best at every place of the answer.

    An answer is the greedy one exactly if it equals this: each place sees the answer before it.
    """
    model = oracle_model(checkpoint)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        logits = [model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :] for prompt, answer in sequences]
    return [rows.argmax(dim=-1).tolist() for rows in logits]


def peft_model(checkpoint: Path, adapter: Path) -> torch.nn.Module:
    """transformers' model with peft's adapter in it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(oracle_model(checkpoint), adapter)
    for name, module in model.named_modules():
        if name.endswith(".dt_proj"):  # transformers multiplies with its weight and passes the adapter by
            module.merge()
    return model


def peft_logits(checkpoint: Path, adapter: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits that peft's adapter gives each prompt alone, [tokens, vocabulary]."""
    model = peft_model(checkpoint, adapter)
    with torch.inference_mode():
        return [row_of(checkpoint).logits(model, torch.tensor([ids]))[0] for ids in prompts]


# Of a model that sees, adapters change neither what reads images nor the rows of a head that are stored apart.
EYES = re.compile(r"vision_model|vision_tower|connector|multi_modal_projector|perceiver_resampler|additional_fc")


def _everything(model: torch.nn.Module) -> list[str]:
    """Every linear, the embedding and the head: all that peft takes of a decoder."""
    from transformers.pytorch_utils import Conv1D

    refused = ("out_proj",) if "mamba" in model.config.model_type else ("\0",)  # by peft itself
    linears = [name for name, module in model.named_modules() if type(module) in (torch.nn.Linear, Conv1D)]
    found = [name for name in linears if not name.endswith(refused)]
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    found = [name for name in found if not EYES.search(name)]
    if model.config.is_encoder_decoder:  # its two stacks pass the embedding's module by
        return found
    return [*found, embedding] if type(model.get_input_embeddings()) is torch.nn.Embedding else found


def edit_config(folder: Path, **fields: object) -> None:
    """Overwrite fields of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, edit) -> None:
    """Rewrite an adapter's tensors: `edit` changes the dict it is given."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
