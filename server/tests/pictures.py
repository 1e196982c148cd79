"""Small pictures, prompts that show them, and what transformers makes of both."""

import json
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kvrun.engine.images import Image as Shown
from kvrun.spec import Images, PanAndScan, Quarters
from kvrun.vision.crops import crops
from kvrun.vision.tiles import Size, count
from PIL import Image, ImageDraw
from tiny import oracle_model

AROUND = 258


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A file with a few shapes on a slope of colours, some noise over it, and see-through corners where the mode knows such."""
    random = np.random.default_rng(seed)
    slope = np.linspace(0, 200, width)[None, :, None] * random.random(3) + np.linspace(0, 55, height)[:, None, None]
    image = Image.fromarray((slope + random.integers(0, 40, (height, width, 3))).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = sorted(random.integers(0, width, 2).tolist()), sorted(random.integers(0, height, 2).tolist())
        draw.ellipse((x[0], y[0], x[1], y[1]), fill=tuple(random.integers(0, 255, 3).tolist()))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.tri(height, width, dtype=np.uint8) * 180 + 40))
    data = BytesIO()
    image.convert(mode).save(data, kind)
    return data.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    data = picture(1, 1)
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def pillow(data: bytes) -> Image.Image:
    """A file as users of transformers open it."""
    return Image.open(BytesIO(data))


def ids_of(images: Images, data: bytes) -> list[int]:
    """The ids that an image becomes, and where a picture has a fixed number of them, one id around each."""
    (width, height), cutting = pillow(data).size, images.cutting
    if images.features:
        more = 4 if isinstance(cutting, Quarters) else len(crops(cutting, Size(height, width))) if isinstance(cutting, PanAndScan) else 0
        return [AROUND, *([images.token] * images.features + [AROUND]) * (1 + more)]
    return [images.token] * count(Size(height, width), cutting.side, cutting.tokens, cutting.grids)


def prompt(images: Images, parts: Sequence[list[int] | bytes]) -> tuple[list[int], list[Shown]]:
    """Tokens and images laid after each other."""
    tokens: list[int] = []
    shown = []
    for part in parts:
        if isinstance(part, bytes):
            ids = ids_of(images, part)
            first, last = ids.index(images.token), len(ids) - ids[::-1].index(images.token)
            shown.append(Shown(part, len(tokens) + first, last - first))
            tokens += ids
        else:
            tokens += part
    return tokens, shown


WIDE, TALL = picture(61, 17, seed=1), picture(23, 40, seed=2, kind="JPEG")
CLEAR, GREY = picture(20, 20, seed=3, mode="RGBA"), picture(9, 30, seed=4, mode="L")


def text(count: int, seed: int) -> list[int]:
    """Random ids without specials."""
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PARTS = {
    "one image": [text(5, 1), WIDE, text(9, 2)],
    "one at the very beginning": [TALL, text(4, 3)],
    "two of different sizes": [text(3, 4), WIDE, text(2, 5), TALL, text(6, 6)],
    "two beside each other": [text(7, 7), CLEAR, GREY, text(3, 8)],
    "none": [text(21, 9)],
}


# What transformers' processors are told of tiny models beside their files.
PROCESSORS: dict[str, dict[str, Any]] = {
    "LlavaNext": {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "Idefics2": {"image_seq_len": 5},
    "Gemma3": {"image_seq_length": 9},
}
SPECIALS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


class Oracle:
    """transformers' processors and model of a tiny checkpoint."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = oracle_model(folder)
        kind = type(self.model).__name__.removesuffix("ForConditionalGeneration").removesuffix("ForVisionText2Text")
        added = json.loads((Path(folder) / "tokenizer.json").read_text())["added_tokens"]
        self.tokens = {token["content"]: token["id"] for token in added}
        self.processor = getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(folder)
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        own = {name: token for name, token in SPECIALS.items() if token in self.tokens}
        file = str(Path(folder) / "tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, extra_special_tokens=own, **names)
        self.whole = getattr(transformers, f"{kind}Processor")(self.processor, tokenizer, **PROCESSORS.get(kind, {}))
        # Which takes these settings from its caller, whatever the file says.
        panned = {name: value for name, value in vars(self.processor).items() if "pan_and_scan" in name}
        self.told = {"images_kwargs": panned} if panned.get("do_pan_and_scan") else {}

    def ids(self, parts: Sequence[str | bytes], marker: str) -> list[int]:
        """What texts and images after each other become, without what begins every prompt."""
        seen = [pillow(part) if isinstance(part, bytes) else part for part in parts]
        files = [part for part in seen if not isinstance(part, str)]
        if self.model.config.model_type == "idefics":
            return self.whole(text=[seen], return_tensors="pt")["input_ids"][0, 1:].tolist()
        text = "".join(part if isinstance(part, str) else marker for part in seen)
        return self.whole(text=text, images=files or None, return_tensors="pt", **self.told)["input_ids"][0].tolist()

    def logits(self, tokens: Sequence[int], files: Sequence[bytes] = ()) -> torch.Tensor:
        """Of every token, [tokens, vocabulary]."""
        ids, kind = torch.tensor([list(tokens)]), self.model.config.model_type
        if kind == "idefics":
            inputs = self._looked_at(ids, files)
        else:
            inputs = self.pixels(files) if files else {}
            if kind == "gemma3":
                inputs["token_type_ids"] = (ids == self.model.config.image_token_id).long()
        with torch.inference_mode():
            return self.model(ids, **inputs).logits[0]

    def pixels(self, files: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """What the model is given of images."""
        seen = self.processor(images=[pillow(data) for data in files], do_convert_rgb=True, return_tensors="pt")
        seen = {"pixel_values": seen} if isinstance(seen, torch.Tensor) else seen
        return {name: tensor for name, tensor in seen.items() if name != "num_crops"}

    def _looked_at(self, ids: torch.Tensor, files: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """Pixels, and which image each token looks at."""
        from transformers.models.idefics import processing_idefics

        side, count = self.model.config.vision_config.image_size, max(len(files), 1)
        seen = self.pixels(files)["pixel_values"] if files else torch.zeros(1, 3, side, side)
        tokenizer = SimpleNamespace(eos_token_id=self.model.config.eos_token_id, convert_tokens_to_ids=self.tokens.get)
        last, _ = processing_idefics.image_attention_mask_for_packed_input_ids(ids, tokenizer, "pt")
        mask = processing_idefics.incremental_to_binary_attention_mask(last, "pt", num_classes=count)
        return {"pixel_values": seen[None], "image_attention_mask": mask}
