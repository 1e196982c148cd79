"""Gemma 3 with images: SigLIP's features averaged down to a fixed number, which see each other in both directions."""

from dataclasses import replace

from kvrun.models import siglip
from kvrun.models.inner import SPELLINGS, language_model
from kvrun.spec import (
    Config,
    Images,
    Matrix,
    Model,
    Normalise,
    PanAndScan,
    Pool,
    RmsNorm,
    Square,
    architecture,
    image_processor,
    pixels,
    special_tokens,
    token_text,
)

PROJECTOR = "model.multi_modal_projector"
HALF = (0.5, 0.5, 0.5)


@architecture("Gemma3ForConditionalGeneration")
def gemma3_image(c: Config) -> Model:
    """Gemma 3 of 4 billion parameters and more."""
    text = language_model(c, "model.language_model.", "gemma3_text")
    unread = (r"vision_tower\.(vision_model\.)?head\.",)  # a pooled feature that nobody asks for
    return replace(text, images=_images(c, text.decoder.embed.hidden), leftovers=(*text.leftovers, *unread), spellings=SPELLINGS)


def _images(c: Config, hidden: int) -> Images:
    vision, processor = c.within("vision_config").otherwise(**siglip.DEFAULTS), image_processor(c)
    token, count = c.get("image_token_index", c.get("image_token_id", 262_144)), c.get("mm_tokens_per_image", 256)
    edges, tokens = (c.get("boi_token_index", 255_999), c.get("eoi_token_index", 256_000)), special_tokens(c)
    begin, features, end = (token_text(c, tokens, known) for known in (edges[0], token, edges[1]))
    side, panned = vision.image_size, processor.get("do_pan_and_scan", False)
    return Images(
        marker=begin,
        text=f"\n\n{begin}{features}{end}\n\n",
        token=token,
        cutting=_pan_and_scan(processor, side) if panned else Square(side),
        pixels=pixels(processor, HALF, HALF, filter=2),
        encoder=siglip.encoder(vision, "model.vision_tower."),
        stages=(
            Pool(int(count**0.5)),
            Normalise(RmsNorm(f"{PROJECTOR}.mm_soft_emb_norm", vision.layer_norm_eps, offset=1.0), vision.hidden_size),
            Matrix(f"{PROJECTOR}.mm_input_projection_weight", vision.hidden_size, hidden),
        ),
        features=count,
        together=True,
    )


def _pan_and_scan(processor: Config, side: int) -> PanAndScan:
    return PanAndScan(
        side,
        max(1, processor.get("pan_and_scan_min_crop_size", 256)),
        max(1, processor.get("pan_and_scan_max_num_crops", 4)),
        processor.get("pan_and_scan_min_ratio_to_activate", 1.2),
        before_whole="Here is the original image ",
        before_crops=" and here are some crops to help you see better ",
        between_crops=" ",
    )
