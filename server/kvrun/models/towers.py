"""Image encoders of which a model names one and reads an inner layer's output."""

from collections.abc import Callable
from typing import Any

from kvrun.models import clip, siglip
from kvrun.spec import Config, PictureEncoder

CLIP_L = {**clip.DEFAULTS, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWERS: dict[str, tuple[dict[str, Any], Callable[[Config, str, int], PictureEncoder]]] = {
    "clip_vision_model": ({**CLIP_L, "image_size": 336, "patch_size": 14}, clip.lower),
    "siglip_vision_model": (siglip.DEFAULTS, siglip.lower),
}


def tower(c: Config, at: str) -> PictureEncoder:
    """The encoder of `vision_config` up to the layer whose output is read, -2 being the last but one."""
    vision = c.within("vision_config")
    vision.only("model_type", *TOWERS)
    defaults, lower = TOWERS[vision.get("model_type", "clip_vision_model")]
    vision = vision.otherwise(**defaults)
    layer, above = c.get("vision_feature_layer", -2), vision.num_hidden_layers + 1
    c.only("vision_feature_layer", *range(-above, above))
    return lower(vision, at, layer % above)
