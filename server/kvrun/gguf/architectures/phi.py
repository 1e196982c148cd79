"""Phi 3, 3.5 and 4."""

from kvrun.gguf.architecture import RMS, Architecture, Config, register
from kvrun.gguf.architectures.llama import AT, ENDS, NORMS
from kvrun.gguf.container import Container

FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


def phi3(container: Container, config: Config) -> Config:
    """A window of 0 is none."""
    window = container.field("{arch}.attention.sliding_window", 0)
    return {"sliding_window": window or None}


register(
    Architecture("phi3", "Phi3ForCausalLM", ENDS, AT, {**NORMS, **FUSED}, RMS, {"hidden_act": "silu"}, phi3),
)
