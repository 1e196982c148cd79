"""Seed-OSS: Llama's shape with biases of its own choice."""

from kvrun.models.llama import attention, decoder
from kvrun.spec import Config, Model, architecture


@architecture("SeedOssForCausalLM")
def seed_oss(c: Config) -> Model:
    """Seed-OSS of any size."""
    biased, out = c.get("attention_bias", True), c.get("attention_out_bias", False)
    return decoder(c, lambda i: attention(c, qkv_bias=biased, out_bias=out))
