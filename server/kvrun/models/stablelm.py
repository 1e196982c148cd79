"""StableLM: Llama's matrices, layer norms, a quarter of each head rotated, in sequence or side by side."""

from collections.abc import Sequence
from dataclasses import replace

from kvrun.models.llama import attention, feed_forward, language_model
from kvrun.spec import Attention, Config, EachHeadNorm, Head, LayerNorm, Model, Residual, Step, architecture


@architecture("StableLmForCausalLM")
def stablelm(c: Config) -> Model:
    """StableLM 3B and StableLM 2."""
    c = c.otherwise(partial_rotary_factor=0.25)
    first, second = LayerNorm("input_layernorm", c.layer_norm_eps), LayerNorm("post_attention_layernorm", c.layer_norm_eps)

    def layer(i: int) -> Sequence[Step]:
        if c.get("use_parallel_residual", False):
            return [Residual(first, attend(c), feed_forward(c))]
        return [Residual(first, attend(c)), Residual(second, feed_forward(c))]

    return language_model(c, layer, Head(LayerNorm("model.norm", c.layer_norm_eps), "lm_head", tied=c.get("tie_word_embeddings", False)))


def attend(c: Config) -> Attention:
    """The attention of any layer; the largest model stores a norm for every query and key head."""
    plain = attention(c, qkv_bias=c.get("use_qkv_bias", False))
    query, key = (LayerNorm(f"self_attn.{side}_layernorm.norms.{{head}}", c.layer_norm_eps, bias=False) for side in "qk")
    return replace(plain, norm=EachHeadNorm(query, key)) if c.get("qk_layernorm", False) else plain
