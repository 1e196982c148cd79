"""Cohere's Command R: one norm without bias before attention and feed-forward side by side, interleaved rotation, scaled logits."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvrun.models.llama import attention, feed_forward, language_model
from kvrun.spec import Attention, Config, EachHeadNorm, Head, LayerNorm, Model, Residual, Step, architecture


@architecture("CohereForCausalLM")
def cohere(c: Config) -> Model:
    """Command R, and Command R+ with a vector for each query and key head."""
    each = EachHeadNorm(norm(c, "self_attn.q_norm"), norm(c, "self_attn.k_norm"))
    return side_by_side(c, lambda i: replace(attend(c), norm=each if c.get("use_qk_norm", False) else None))


def norm(c: Config, name: str) -> LayerNorm:
    """A layer norm without bias."""
    return LayerNorm(name, c.get("layer_norm_eps", 1e-5), bias=False)


def attend(c: Config) -> Attention:
    """The attention of a layer that sees everything."""
    bias = c.get("attention_bias", False)
    return replace(attention(c, qkv_bias=bias, out_bias=bias), position=c.rope(c.head_dim, "interleaved"))


def side_by_side(c: Config, attend: Callable[[int], Attention]) -> Model:
    """Attention and feed-forward read the same norm; `attend` says the attention of layer i."""

    def layer(i: int) -> Sequence[Step]:
        return [Residual(norm(c, "input_layernorm"), attend(i), feed_forward(c))]

    tied, scale = c.get("tie_word_embeddings", True), c.get("logit_scale", 0.0625)
    model = language_model(c, layer, Head(norm(c, "model.norm"), "lm_head", tied=tied, scale=scale))
    return replace(model, positions=c.get("model_max_length", model.positions))  # the first files' other count is for training
