"""Mistral: Llama's shape with an optional sliding window on every layer."""

from kvrun.models.llama import attention, decoder
from kvrun.spec import Config, Model, architecture


@architecture("MistralForCausalLM")
def mistral(c: Config) -> Model:
    """Mistral; no window in the config means none."""
    return decoder(c, lambda i: attention(c, window=c.get("sliding_window")))
