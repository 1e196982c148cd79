"""LLaVA-NeXT over Mistral and over Llama."""

import json
from pathlib import Path

import torch

from tiny.row import LLAMA, VOCABULARY, Row

SIDE, PATCH = 16, 4  # pixels of a tile and of a patch
GRIDS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": SIDE, "patch_size": PATCH}
TEXT = {**LLAMA, "vocab_size": VOCABULARY + 3}
LLAVA = {
    "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
    "vision_config": {**TOWER, "model_type": "clip_vision_model"},
    "image_token_index": VOCABULARY,
    "image_grid_pinpoints": GRIDS,
}


def seeing(name: str) -> bool:
    """Whether a parameter is of what makes features of a picture."""
    return any(part in name for part in ("vision", "connector", "projector"))


def visible(model: torch.nn.Module) -> None:
    """Weigh patches and positions alike, so that a picture's pixels and their places both show in its features."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("patch_embedding.weight"):
                parameter *= 0.05
            elif name.endswith("position_embedding.weight"):
                parameter *= 50


def blending(model: torch.nn.Module) -> None:
    """Let a patch look at many others: with larger matrices it looks at one, and a last bit decides which of many that are alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and seeing(name) and not name.endswith("position_embedding.weight"):
                parameter *= 1 / 6


def glancing(model: torch.nn.Module) -> None:
    """Let a token of the text look at many patches too, which lie so near each other that a last bit would choose among them."""
    blending(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not seeing(name) and name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 1 / 6


def processor(folder: Path) -> None:
    """The settings of images in a file of their own, as published folders have them."""
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "image_grid_pinpoints": GRIDS}
    settings = {"image_processor_type": "LlavaNextImageProcessor", "do_resize": True, "resample": 3, **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


SEEING = {"auto": "AutoModelForImageTextToText", "adjust": visible, "settle": glancing}
OWN = {"specials": ("<image>",), "prepare": processor, "architecture": "LlavaNextForConditionalGeneration"}

ROWS = {
    "llava_next": Row("llava_next", LLAVA, **SEEING, **OWN),
    "llava_next_llama": Row(
        "llava_next",
        {**LLAVA, "text_config": {**TEXT, "model_type": "llama"}, "vision_feature_layer": -1, "multimodal_projector_bias": False},
        **SEEING,
        **OWN,
    ),
}
