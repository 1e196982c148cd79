"""Idefics: Llama, and before every few of its layers one whose tokens look at the last image before them, gated."""

from kvrun.models import clip
from kvrun.models.gated import looking
from kvrun.models.inner import LLAMA
from kvrun.models.llama import attention, feed_forward
from kvrun.models.perceiver import of_idefics
from kvrun.spec import Config, Decoder, Embed, Head, Images, Layer, Model, PictureEncoder, Residual, Rest, RmsNorm, Square, architecture
from kvrun.spec.companions import image_processor, pixels, special_tokens, token_id

DEFAULTS = {**LLAMA, "additional_vocab_size": 0, "alpha_type": "float", "cross_layer_interval": 1, "eos_token_id": 2}
VISION = {**clip.DEFAULTS, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
AROUND, IMAGE = "<fake_token_around_image>", "<image>"


@architecture("IdeficsForVisionText2Text")
def idefics(c: Config) -> Model:
    """Idefics of either size."""
    c = c.otherwise(**DEFAULTS)
    # Both of a kind in every published model, and told apart by nothing but this field.
    c.only("alpha_type", "float", "vector")
    c.only("tie_word_embeddings", False)
    vision = c.within("vision_config").otherwise(embed_dim=768, **{**VISION, "hidden_act": "gelu"})
    vision = vision.stating(hidden_size=vision.embed_dim)
    more = c.additional_vocab_size

    def rest(name: str) -> Rest | None:
        return Rest(name, more) if more else None

    return Model(
        Decoder(
            embed=Embed("model.embed_tokens", c.vocab_size + more, c.hidden_size, rest=rest("model.embed_tokens.additional_embedding")),
            layers=tuple(layer for i in range(c.num_hidden_layers) for layer in _layers(c, i, vision.embed_dim)),
            head=Head(RmsNorm("model.norm", c.rms_norm_eps), "lm_head", rest=rest("lm_head.additional_fc")),
        ),
        positions=c.max_position_embeddings,
        leftovers=(r"\.rotary_emb\.inv_freq$", r"vision_model\.post_layernorm\.", r"\.position_ids$"),
        images=_images(c, vision),
    )


def _layers(c: Config, i: int, width: int) -> list[Layer]:
    norms = (RmsNorm(f"{at}_layernorm", c.rms_norm_eps) for at in ("input", "post_attention"))
    own = (Residual(next(norms), attention(c)), Residual(next(norms), feed_forward(c)))
    layer = Layer(f"model.layers.{i}", own)
    number, other = divmod(i, c.cross_layer_interval)
    return [layer] if other else [looking(c, f"model.gated_cross_attn_layers.{number}", width), layer]


def _images(c: Config, vision: Config) -> Images:
    processor = image_processor(c)
    lower = clip.lower(vision, "model.vision_model.", vision.num_hidden_layers)
    perceiver = c.within("perceiver_config")
    resampled = c.get("use_resampler", perceiver.get("use_resampler", False))
    stages = (of_idefics(perceiver, "model.perceiver_resampler", vision.embed_dim),) if resampled else ()
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    return Images(
        marker=IMAGE,
        text=AROUND + IMAGE + AROUND,
        token=token_id(c, special_tokens(c), IMAGE),
        cutting=Square(vision.image_size),
        pixels=pixels(processor, clip.MEAN, clip.STD, filter=3),
        encoder=PictureEncoder(lower.patches, lower.layers, lower.before),
        stages=stages,
        features=1,
        border=AROUND,
        spaces="trimmed",
        memory=stages[0].count if stages else patches,
        end_of_text=c.eos_token_id,
    )
