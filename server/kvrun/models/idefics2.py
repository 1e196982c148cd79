"""Idefics 2: Mistral, and images of any shape of which a fixed number of latents is all that it sees."""

from dataclasses import replace

from kvrun.models import siglip
from kvrun.models.inner import language_model
from kvrun.spec import (
    Bounded,
    Config,
    Feed,
    FractionalPositions,
    GatedMlp,
    Images,
    Model,
    Perceive,
    Quarters,
    Resample,
    Residual,
    RmsNorm,
    architecture,
    fuse,
    image_processor,
    linear,
    pixels,
    special_tokens,
    stack,
    token_id,
    token_text,
)

AROUND = "<fake_token_around_image>"
CONNECTOR = "model.connector.modality_projection"
RESAMPLER = "model.connector.perceiver_resampler"
HALF = (0.5, 0.5, 0.5)


@architecture("Idefics2ForConditionalGeneration")
def idefics2(c: Config) -> Model:
    """Idefics 2 over whichever language model its `text_config` describes."""
    text = language_model(c, "model.text_model.", "mistral")
    return replace(text, images=_images(c, text.decoder.embed.hidden))


def _images(c: Config, hidden: int) -> Images:
    vision = c.within("vision_config").otherwise(**{**siglip.DEFAULTS, "patch_size": 32})
    resample = _resampler(c, hidden)
    processor, tokens, token = image_processor(c), special_tokens(c), c.get("image_token_id", 32_001)
    each = [token_id(c, tokens, AROUND)] + [token] * resample.count
    size = {"shortest_edge": 378, "longest_edge": 980, **processor.get("size", {})}
    bounded, split = Bounded(size["shortest_edge"], size["longest_edge"]), processor.get("do_image_splitting", False)
    return Images(
        marker=token_text(c, tokens, token),
        token=token,
        cutting=Quarters(bounded) if split else bounded,
        pixels=pixels(processor, HALF, HALF, filter=2),
        encoder=siglip.encoder(vision, "model.vision_model.", FractionalPositions),
        stages=(_projection(c, vision.hidden_size, hidden), resample),
        # Neighbours share the token between them.
        ids=(*each * (5 if split else 1), each[0]),
    )


def _projection(c: Config, width: int, hidden: int) -> Feed:
    text = c.within("text_config").otherwise(intermediate_size=14_336, hidden_act="silu")
    part = GatedMlp(
        text.intermediate_size,
        text.hidden_act,
        gate_up=fuse(f"{CONNECTOR}.gate_proj", f"{CONNECTOR}.up_proj"),
        down=linear(f"{CONNECTOR}.down_proj"),
    )
    return Feed(part, width, hidden)


def _resampler(c: Config, hidden: int) -> Resample:
    p = c.within("perceiver_config").otherwise(hidden_size=4096, rms_norm_eps=1e-6, hidden_act="silu", num_key_value_heads=4)
    if p.hidden_size != hidden:  # left unsaid, and then it is as the language model's
        p = p.stating(rms_norm_eps=c.within("text_config").get("rms_norm_eps", 1e-6))
    look = Perceive(
        p.get("resampler_n_heads", 16),
        p.num_key_value_heads,
        p.get("resampler_head_dim", 96),
        norm=RmsNorm("input_context_norm", p.rms_norm_eps),
        query=linear("self_attn.q_proj"),
        key_value=fuse("self_attn.k_proj", "self_attn.v_proj"),
        out=linear("self_attn.o_proj"),
    )
    mlp = GatedMlp(4 * hidden, p.hidden_act, gate_up=fuse("mlp.gate_proj", "mlp.up_proj"), down=linear("mlp.down_proj"))
    steps = [
        Residual(RmsNorm("input_latents_norm", p.rms_norm_eps), look),
        Residual(RmsNorm("post_attention_layernorm", p.rms_norm_eps), mlp),
    ]
    return Resample(
        f"{RESAMPLER}.latents",
        p.get("resampler_n_latents", 64),
        hidden,
        stack(p.get("resampler_depth", 3), RESAMPLER + ".layers.{i}", steps),
        RmsNorm(f"{RESAMPLER}.norm", p.rms_norm_eps),
    )
