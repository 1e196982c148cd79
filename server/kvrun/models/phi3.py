"""Phi 3, 3.5 and 4: Llama's shape with query, key and value in one matrix, gate and up in another, and an optional window."""

from dataclasses import replace

from kvrun.models.llama import attention, decoder, feed_forward
from kvrun.spec import Attention, Config, GatedMlp, Model, architecture, packed


@architecture("Phi3ForCausalLM")
def phi3(c: Config) -> Model:
    """Phi 3 and 4 of any size."""
    return decoder(c, lambda i: attend(c), lambda i: feed(c))


def attend(c: Config) -> Attention:
    """The attention of any layer."""
    return replace(attention(c, window=c.get("sliding_window")), qkv=packed("self_attn.qkv_proj"))


def feed(c: Config) -> GatedMlp:
    """The feed-forward part of any layer."""
    return replace(feed_forward(c), gate_up=packed("mlp.gate_up_proj"))
