"""Helium: Llama's shape, rotated interleaved."""

from dataclasses import replace

from kvrun.models.llama import attention, decoder
from kvrun.spec import Config, Model, architecture


@architecture("HeliumForCausalLM")
def helium(c: Config) -> Model:
    """Helium of any size; its attention output has no bias."""
    c = c.otherwise(rope_theta=1e5)
    attend = replace(attention(c, qkv_bias=c.get("attention_bias", False)), position=c.rope(c.head_dim, "interleaved"))
    return decoder(c, lambda i: attend)
