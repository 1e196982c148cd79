"""Granite: Llama's shape with multipliers on the embedding, on the scores, on what each part adds, and a divisor of the logits."""

from collections.abc import Sequence
from dataclasses import replace

from kvrun.models.llama import attention, feed_forward, language_model
from kvrun.spec import Config, Head, Model, Residual, RmsNorm, Step, architecture


@architecture("GraniteForCausalLM")
def granite(c: Config) -> Model:
    """Granite 3 of any size."""
    bias, eps, scale = c.get("attention_bias", False), c.rms_norm_eps, c.get("residual_multiplier", 1.0)
    attend = replace(attention(c, qkv_bias=bias, out_bias=bias), scale=c.get("attention_multiplier", 1.0))

    def layer(i: int) -> Sequence[Step]:
        return [
            Residual(RmsNorm("input_layernorm", eps), attend, scale=scale),
            Residual(RmsNorm("post_attention_layernorm", eps), feed_forward(c), scale=scale),
        ]

    tied, divisor = c.get("tie_word_embeddings", False), c.get("logits_scaling", 1.0)
    head = Head(RmsNorm("model.norm", eps), "lm_head", tied=tied, scale=1 / divisor)
    return language_model(c, layer, head, embedding_scale=c.get("embedding_multiplier", 1.0))
