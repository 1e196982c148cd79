"""Idefics 2: Mistral, and images of any shape of which a fixed number of latents is all that it sees."""

from dataclasses import replace

from kvrun.models import perceiver, siglip
from kvrun.models.inner import language_model
from kvrun.spec import (
    Bounded,
    Config,
    Feed,
    FractionalPositions,
    GatedMlp,
    Images,
    Model,
    Quarters,
    architecture,
    begins_words,
    fuse,
    image_processor,
    linear,
    pixels,
    special_tokens,
    token_text,
)

AROUND = "<fake_token_around_image>"
CONNECTOR = "model.connector.modality_projection"
HALF = (0.5, 0.5, 0.5)


@architecture("Idefics2ForConditionalGeneration")
def idefics2(c: Config) -> Model:
    """Idefics 2 over whichever language model its `text_config` describes."""
    text = language_model(c, "model.text_model.", "mistral")
    return replace(text, images=_images(c, text.decoder.embed.hidden))


def _images(c: Config, hidden: int) -> Images:
    vision = c.within("vision_config").otherwise(**{**siglip.DEFAULTS, "patch_size": 32})
    resample = perceiver.of_idefics2(_perceiver(c, hidden), "model.connector.perceiver_resampler", hidden)
    processor, token = image_processor(c), c.get("image_token_id", 32_001)
    marker = token_text(c, special_tokens(c), token)
    size = {"shortest_edge": 378, "longest_edge": 980, **processor.get("size", {})}
    bounded, split = Bounded(size["shortest_edge"], size["longest_edge"]), processor.get("do_image_splitting", False)
    return Images(
        marker=marker,
        text=AROUND + (marker + AROUND) * (5 if split else 1),
        token=token,
        cutting=Quarters(bounded) if split else bounded,
        pixels=pixels(processor, HALF, HALF, filter=2),
        encoder=siglip.encoder(vision, "model.vision_model.", FractionalPositions),
        stages=(_projection(c, vision.hidden_size, hidden), resample),
        features=resample.count,
        border=AROUND,
        spaces="kept" if begins_words(c) else "parted",
    )


def _projection(c: Config, width: int, hidden: int) -> Feed:
    text = c.within("text_config").otherwise(intermediate_size=14_336, hidden_act="silu")
    gate_up, down = fuse(f"{CONNECTOR}.gate_proj", f"{CONNECTOR}.up_proj"), linear(f"{CONNECTOR}.down_proj")
    return Feed(GatedMlp(text.intermediate_size, text.hidden_act, gate_up, down), width, hidden)


def _perceiver(c: Config, hidden: int) -> Config:
    p = c.within("perceiver_config").otherwise(hidden_size=4096, rms_norm_eps=1e-6, hidden_act="silu", num_key_value_heads=4)
    # Left unsaid it is the language model's.
    return p if p.hidden_size == hidden else p.stating(rms_norm_eps=c.within("text_config").get("rms_norm_eps", 1e-6))
