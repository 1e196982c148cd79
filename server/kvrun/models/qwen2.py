"""Qwen 1.5, 2 and 2.5: Llama's shape with biases on query, key and value, and a window on the upper layers if asked for."""

from kvrun.models.llama import attention, decoder
from kvrun.spec import Config, Model, architecture


@architecture("Qwen2ForCausalLM")
def qwen2(c: Config) -> Model:
    """Qwen 2; the window holds from layer `max_window_layers` on."""
    first = c.get("max_window_layers", 28) if c.get("use_sliding_window", False) else c.num_hidden_layers
    return decoder(c, lambda i: attention(c, qkv_bias=True, window=c.get("sliding_window") if i >= first else None))
