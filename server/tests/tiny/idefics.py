"""Idefics, with gates of both shapes, with and without latents."""

import json
from pathlib import Path

import torch

from tiny.llava_next import TOWER, blending, glancing, visible
from tiny.row import COMMON, SHAPE, VOCABULARY, Row

VISION = {name: size for name, size in TOWER.items() if name != "hidden_size"}
PERCEIVER = {"use_resampler": True, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8}
IDEFICS = {
    **COMMON,
    **SHAPE,
    "vocab_size": VOCABULARY,
    "additional_vocab_size": 2,
    "intermediate_size": 96,
    "cross_layer_interval": 2,
    "vision_config": {**VISION, "embed_dim": 32},
}


def processor(folder: Path) -> None:
    """The settings of images."""
    settings = {"image_processor_type": "IdeficsImageProcessor", "image_size": 16, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def text_only(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """A prompt that looks at no image."""
    side = model.config.vision_config.image_size
    seen = torch.zeros(len(ids), ids.shape[1], 1, dtype=torch.long)
    return model(ids, pixel_values=torch.zeros(len(ids), 1, 3, side, side), image_attention_mask=seen).logits


def gated(model: torch.nn.Module) -> None:
    """Open the gates, which begin shut."""
    visible(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.copy_(torch.linspace(0.3, 0.9, parameter.numel()).view(parameter.shape))


SEEING = {
    "auto": "AutoModelForImageTextToText",
    "adjust": gated,
    "prepare": processor,
    "specials": ("<fake_token_around_image>", "<image>"),
    "architecture": "IdeficsForVisionText2Text",
    "logits": text_only,
}

ROWS = {
    "idefics": Row(
        "idefics",
        {**IDEFICS, "use_resampler": True, "perceiver_config": PERCEIVER, "alpha_type": "vector", "qk_layer_norms": True},
        seed=9,
        settle=blending,
        **SEEING,
    ),
    "idefics_patches": Row("idefics", {**IDEFICS, "cross_layer_interval": 1}, settle=glancing, **SEEING),
}
