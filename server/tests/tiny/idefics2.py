"""Idefics 2, with images in quarters and whole."""

import json
from collections.abc import Callable
from pathlib import Path

from tiny.llava_next import TEXT, TOWER, glancing, visible
from tiny.row import VOCABULARY, Row

PERCEIVER = {"hidden_size": 64, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8}
IDEFICS2 = {
    "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
    "vision_config": {**TOWER, "image_size": 28},
    "perceiver_config": {**PERCEIVER, "num_key_value_heads": 2},
    "image_token_id": VOCABULARY,
}


def processor(splitting: bool) -> Callable[[Path], None]:
    """Writes the settings of images as a part of the processor's, as newer folders have them."""
    images = {"image_processor_type": "Idefics2ImageProcessor", "do_image_splitting": splitting}
    settings = {"image_processor": {**images, "size": {"shortest_edge": 9, "longest_edge": 27}}, "image_seq_len": 5}
    return lambda folder: (folder / "processor_config.json").write_text(json.dumps(settings)) and None


SEEING = {
    "auto": "AutoModelForImageTextToText",
    "adjust": visible,
    "settle": glancing,
    "specials": ("<image>", "<fake_token_around_image>"),
    "architecture": "Idefics2ForConditionalGeneration",
}

ROWS = {
    "idefics2": Row("idefics2", IDEFICS2, prepare=processor(splitting=True), **SEEING),
    "idefics2_whole": Row("idefics2", IDEFICS2, prepare=processor(splitting=False), **SEEING),
}
