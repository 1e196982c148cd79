"""Qwen 1.5, 2 and 2.5: Llama's shape with biases on query, key and value, and a window on the upper layers if asked for."""

from kvrun.models.llama import attention, decoder
from kvrun.spec import Config, Model, architecture


@architecture("Qwen2ForCausalLM")
def qwen2(c: Config) -> Model:
    """Qwen 2 of any size."""
    return decoder(c, lambda i: attention(c, qkv_bias=True, window=window(c, i)))


def window(c: Config, i: int) -> int | None:
    """The window of layer i: it holds from layer `max_window_layers` on, if at all."""
    first = c.get("max_window_layers", 28) if c.get("use_sliding_window", False) else c.num_hidden_layers
    return c.get("sliding_window") if i >= first else None
