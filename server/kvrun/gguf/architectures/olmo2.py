"""OLMo 2: norms after each part, and one norm for all heads."""

from kvrun.gguf.architecture import RMS, Architecture, register
from kvrun.gguf.architectures.llama import AT, ATTENTION, ENDS, FEED
from kvrun.gguf.architectures.qwen import HEAD_NORMS

register(
    Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        ENDS,
        AT,
        {
            **ATTENTION,
            **FEED,
            **HEAD_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        RMS,
        {"hidden_act": "silu"},
    ),
)
