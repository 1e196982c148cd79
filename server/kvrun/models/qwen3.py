"""Qwen 3: Qwen 2's shape without its biases, and each query and key head normalised before it is rotated."""

from dataclasses import replace

from kvrun.models.llama import attention, decoder
from kvrun.models.qwen2 import window
from kvrun.spec import Attention, Config, HeadNorm, Model, RmsNorm, architecture


@architecture("Qwen3ForCausalLM")
def qwen3(c: Config) -> Model:
    """Qwen 3 of any size."""
    return decoder(c, lambda i: attend(c, i))


def attend(c: Config, i: int) -> Attention:
    """The attention of layer i."""
    bias = c.get("attention_bias", False)
    norm = HeadNorm(RmsNorm("self_attn.q_norm", c.rms_norm_eps), RmsNorm("self_attn.k_norm", c.rms_norm_eps))
    return replace(attention(c, qkv_bias=bias, out_bias=bias, window=window(c, i)), norm=norm)
