"""Small pictures, prompts that show them, and what transformers makes of both."""

import json
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from kvrun.engine.images import Image as Shown
from kvrun.spec import Images
from kvrun.vision.tiles import Size, count
from PIL import Image, ImageDraw
from tiny import oracle_model


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
    """The ids that an image becomes, as the router makes them of the published rule."""
    if images.ids:
        return list(images.ids)
    (width, height), cutting = pillow(data).size, images.cutting
    return [images.token] * count(Size(height, width), cutting.side, cutting.tokens, cutting.grids)


def prompt(images: Images, parts: Sequence[list[int] | bytes]) -> tuple[list[int], list[Shown]]:
    """Tokens and images laid after each other."""
    tokens: list[int] = []
    shown = []
    for part in parts:
        if isinstance(part, bytes):
            ids = ids_of(images, part)
            shown.append(Shown(part, len(tokens), len(ids)))
            tokens += ids
        else:
            tokens += part
    return tokens, shown


class Oracle:
    """transformers' image processor and model of a tiny checkpoint."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = oracle_model(folder)
        kind = type(self.model).__name__.removesuffix("ForConditionalGeneration").removesuffix("ForVisionText2Text")
        added = json.loads((Path(folder) / "tokenizer.json").read_text())["added_tokens"]
        self.tokens = {token["content"]: token["id"] for token in added}
        self.processor = getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(folder)

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
        """Pixels, and which image each token looks at: the last before it."""
        side, count = self.model.config.vision_config.image_size, max(len(files), 1)
        seen = self.pixels(files)["pixel_values"] if files else torch.zeros(1, 3, side, side)
        last = (ids == self.tokens["<image>"]).cumsum(1) - 1
        return {"pixel_values": seen[None], "image_attention_mask": (last[..., None] == torch.arange(count)).long()}
