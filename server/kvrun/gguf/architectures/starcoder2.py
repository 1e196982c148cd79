"""StarCoder 2 and StableLM: Llama's attention between layer norms."""

from kvrun.gguf.architecture import LAYER, Architecture, Config, has, register
from kvrun.gguf.architectures.llama import AT, ATTENTION, ENDS, FEED, NORMS
from kvrun.gguf.container import Container

EACH_HEAD = {"attn_q_norm": "self_attn.q_layernorm.norms.{i}", "attn_k_norm": "self_attn.k_layernorm.norms.{i}"}


def stablelm(container: Container, config: Config) -> Config:
    """What the tensors tell: with one norm per layer its parts lie side by side."""
    return {
        "use_qkv_bias": has(container, "attn_q.bias"),
        "use_parallel_residual": not has(container, "ffn_norm.weight"),
        "qk_layernorm": has(container, "attn_q_norm.weight"),
    }


register(
    Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        ENDS,
        AT,
        {**NORMS, **ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        LAYER,
        {"hidden_act": "gelu_pytorch_tanh"},
        lambda container, config: {"use_bias": has(container, "attn_q.bias")},
    ),
    Architecture(
        "stablelm",
        "StableLmForCausalLM",
        ENDS,
        AT,
        {**NORMS, **ATTENTION, **FEED, **EACH_HEAD},
        LAYER,
        {"hidden_act": "silu"},
        stablelm,
    ),
)
