"""Perceiver resamplers: latents that look at the features of a picture, as Idefics and as Idefics 2 build them."""

from kvrun.spec import (
    Config,
    GatedMlp,
    HeadNorm,
    Layer,
    LayerNorm,
    Mlp,
    Perceive,
    Resample,
    Residual,
    RmsNorm,
    fuse,
    linear,
    stack,
)


def of_idefics(p: Config, at: str, width: int) -> Resample:
    """Layer norms and plain feed-forward parts, beneath `at`; `p` is the perceiver's config."""
    heads = p.get("resampler_n_heads", 16)
    each = HeadNorm(LayerNorm("0.q_layer_norm", 1e-5), LayerNorm("0.k_layer_norm", 1e-5))
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
    layers = stack(p.get("resampler_depth", 6), f"{at}.blocks.{{i}}", steps)
    return _resample(p, at, width, layers, LayerNorm(f"{at}.layer_norm", 1e-5))


def of_idefics2(p: Config, at: str, width: int) -> Resample:
    """Grouped heads, RMS norms and gated feed-forward parts, beneath `at`; `p` is the perceiver's config."""
    eps = p.rms_norm_eps
    look = Perceive(
        p.get("resampler_n_heads", 16),
        p.num_key_value_heads,
        p.get("resampler_head_dim", 96),
        norm=RmsNorm("input_context_norm", eps),
        query=linear("self_attn.q_proj"),
        key_value=fuse("self_attn.k_proj", "self_attn.v_proj"),
        out=linear("self_attn.o_proj"),
    )
    mlp = GatedMlp(4 * width, p.hidden_act, gate_up=fuse("mlp.gate_proj", "mlp.up_proj"), down=linear("mlp.down_proj"))
    steps = (Residual(RmsNorm("input_latents_norm", eps), look), Residual(RmsNorm("post_attention_layernorm", eps), mlp))
    layers = stack(p.get("resampler_depth", 3), f"{at}.layers.{{i}}", steps)
    return _resample(p, at, width, layers, RmsNorm(f"{at}.norm", eps))


def _resample(p: Config, at: str, width: int, layers: tuple[Layer, ...], norm: LayerNorm | RmsNorm) -> Resample:
    return Resample(f"{at}.latents", p.get("resampler_n_latents", 64), width, layers, norm)
