"""Cohere's Command R and Command R+."""

from kvrun.gguf.architecture import LAYER, Architecture, has, register
from kvrun.gguf.architectures.llama import AT, ATTENTION, ENDS, FEED
from kvrun.gguf.architectures.qwen import HEAD_NORMS

register(
    Architecture(
        "command-r",
        "CohereForCausalLM",
        ENDS,
        AT,
        {"attn_norm": "input_layernorm", **ATTENTION, **FEED, **HEAD_NORMS},
        {**LAYER, "logit_scale": "logit_scale"},
        {"hidden_act": "silu"},
        lambda container, config: {"use_qk_norm": has(container, "attn_q_norm.weight")},
    ),
)
