"""SmolLM 3: Llama's shape, with no positions on every fourth layer."""

from dataclasses import replace

from kvrun.models.llama import attention, decoder
from kvrun.spec import Attention, Config, Model, architecture


@architecture("SmolLM3ForCausalLM")
def smollm3(c: Config) -> Model:
    """SmolLM 3."""
    c = c.otherwise(rope_theta=2e6, tie_word_embeddings=True, num_key_value_heads=4)
    return decoder(c, lambda i: attend(c, i))


def attend(c: Config, i: int) -> Attention:
    """The attention of layer i; `no_rope_layers` holds a 1 for each layer that is rotated, whatever its name says."""
    rotated = c.get("no_rope_layers")
    knows = rotated[i] if rotated is not None else (i + 1) % c.get("no_rope_layer_interval", 4) != 0
    slides = c.get("use_sliding_window", False) and (c.slides(i, every=0) if c.get("layer_types") else not knows)
    bias = c.get("attention_bias", False)
    layer = attention(c, qkv_bias=bias, out_bias=bias, window=c.get("sliding_window") if slides else None)
    return layer if knows else replace(layer, position=None)
