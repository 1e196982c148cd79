"""Idefics: Llama, and before every few of its layers one whose tokens look at the last image before them, gated."""

from kvrun.models import clip
from kvrun.models.llama import attention, feed_forward
from kvrun.spec import (
    Config,
    Decoder,
    Embed,
    Gate,
    Head,
    HeadNorm,
    Images,
    Layer,
    LayerNorm,
    LookAt,
    Mlp,
    Model,
    Perceive,
    PictureEncoder,
    Resample,
    Residual,
    Rest,
    RmsNorm,
    Square,
    Step,
    architecture,
    fuse,
    image_processor,
    linear,
    pixels,
    special_tokens,
    token_id,
)

DEFAULTS = {
    "vocab_size": 32_000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "alpha_type": "float",
    "cross_layer_interval": 1,
}
VISION = {**clip.DEFAULTS, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
AROUND, IMAGE = "<fake_token_around_image>", "<image>"
RESAMPLER = "model.perceiver_resampler"


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
    return Model(
        Decoder(
            embed=Embed(
                "model.embed_tokens",
                c.vocab_size + more,
                c.hidden_size,
                rest=Rest("model.embed_tokens.additional_embedding", more) if more else None,
            ),
            layers=tuple(layer for i in range(c.num_hidden_layers) for layer in _layers(c, i, vision.embed_dim)),
            head=Head(RmsNorm("model.norm", c.rms_norm_eps), "lm_head", rest=Rest("lm_head.additional_fc", more) if more else None),
        ),
        positions=c.max_position_embeddings,
        leftovers=(r"\.rotary_emb\.inv_freq$", r"vision_model\.post_layernorm\.", r"\.position_ids$"),
        images=_images(c, vision),
    )


def _layers(c: Config, i: int, width: int) -> list[Layer]:
    eps = c.rms_norm_eps
    own: tuple[Step, ...] = (
        Residual(RmsNorm("input_layernorm", eps), attention(c)),
        Residual(RmsNorm("post_attention_layernorm", eps), feed_forward(c)),
    )
    layer = Layer(f"model.layers.{i}", own)
    if i % c.cross_layer_interval:
        return [layer]
    one = (1,) if c.alpha_type == "float" else (1, 1, c.hidden_size)
    head_dim = c.hidden_size // c.num_attention_heads
    norm = HeadNorm(RmsNorm("cross_attn.q_layer_norm", eps), RmsNorm("cross_attn.k_layer_norm", eps))
    look = LookAt(
        c.num_attention_heads,
        head_dim,
        width,
        query=linear("cross_attn.q_proj"),
        key_value=fuse("cross_attn.k_proj", "cross_attn.v_proj"),
        out=linear("cross_attn.o_proj"),
        norm=norm if c.get("qk_layer_norms", False) else None,
    )
    gated: tuple[Step, ...] = (
        Residual(RmsNorm("input_layernorm", eps), look, after=Gate("alpha_cross_attn", one)),
        Residual(RmsNorm("post_attention_layernorm", eps), feed_forward(c), after=Gate("alpha_dense", one)),
    )
    return [Layer(f"model.gated_cross_attn_layers.{i // c.cross_layer_interval}", gated), layer]


def _images(c: Config, vision: Config) -> Images:
    processor, tokens = image_processor(c), special_tokens(c)
    token, around = token_id(c, tokens, IMAGE), token_id(c, tokens, AROUND)
    lower = clip.lower(vision, "model.vision_model.", vision.num_hidden_layers)
    resample = _resampler(c, vision.embed_dim)
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    return Images(
        marker=IMAGE,
        token=token,
        cutting=Square(vision.image_size),
        pixels=pixels(processor, clip.MEAN, clip.STD, filter=3),
        encoder=PictureEncoder(lower.patches, lower.layers, lower.before),
        stages=() if resample is None else (resample,),
        ids=(around, token, around),
        memory=patches if resample is None else resample.count,
    )


def _resampler(c: Config, width: int) -> Resample | None:
    p = c.within("perceiver_config")
    if not c.get("use_resampler", p.get("use_resampler", False)):
        return None
    each = HeadNorm(LayerNorm("0.q_layer_norm", 1e-5), LayerNorm("0.k_layer_norm", 1e-5))
    heads = p.get("resampler_n_heads", 16)
    look = Perceive(
        heads,
        heads,
        p.get("resampler_head_dim", 96),
        norm=LayerNorm("0.context_layer_norm", 1e-5),
        query=linear("0.q_proj"),
        key_value=fuse("0.k_proj", "0.v_proj"),
        out=linear("0.output_proj"),
        each=each if p.get("qk_layer_norms_perceiver", False) else None,
    )
    mlp = Mlp(4 * width, "relu", up=linear("1.fc"), down=linear("1.c_proj"))
    steps = (Residual(LayerNorm("0.latents_layer_norm", 1e-5), look), Residual(LayerNorm("1.ln", 1e-5), mlp))
    blocks = tuple(Layer(f"{RESAMPLER}.blocks.{i}", steps) for i in range(p.get("resampler_depth", 6)))
    return Resample(f"{RESAMPLER}.latents", p.get("resampler_n_latents", 64), width, blocks, LayerNorm(f"{RESAMPLER}.layer_norm", 1e-5))
