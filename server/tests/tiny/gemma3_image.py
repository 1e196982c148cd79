"""Gemma 3 with images of more tokens than its window is wide, whole, and in crops too."""

import json
from functools import partial
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from tiny.gemma import GEMMA3
from tiny.llava_next import TOWER, blending, visible
from tiny.row import VOCABULARY, Row

SIDE = 24
BREAKS = ("\n\n", "\n\n\n", "\n\n\n\n")  # each a token, as in published vocabularies
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_IMAGE = {
    "text_config": {**GEMMA3, "vocab_size": VOCABULARY + 3 + len(BREAKS), "layer_types": LAYERS, "model_type": "gemma3_text"},
    "vision_config": {**TOWER, "image_size": SIDE, "model_type": "siglip_vision_model", "vision_use_head": False},
    "mm_tokens_per_image": 9,
    "image_token_index": VOCABULARY,
    "boi_token_index": VOCABULARY + 1,
    "eoi_token_index": VOCABULARY + 2,
}


PANNED = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4}
PANNED |= {"pan_and_scan_min_ratio_to_activate": 1.2}


def processor(folder: Path, **stated: object) -> None:
    """The settings of images, with nulls as published files have them, and tokens of several line breaks."""
    settings = {"size": {"height": SIDE, "width": SIDE}, "do_pan_and_scan": None, "do_convert_rgb": None, "resample": 2}
    settings |= {"image_processor_type": "Gemma3ImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **stated}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in BREAKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 9, "processor_class": "Gemma3Processor"}))


SEEING = {
    "auto": "AutoModelForImageTextToText",
    "adjust": visible,
    "settle": blending,
    "specials": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
    "architecture": "Gemma3ForConditionalGeneration",
}

ROWS = {
    "gemma3_image": Row("gemma3", GEMMA3_IMAGE, prepare=processor, **SEEING),
    "gemma3_panned": Row("gemma3", GEMMA3_IMAGE, prepare=partial(processor, **PANNED), **SEEING),
}
