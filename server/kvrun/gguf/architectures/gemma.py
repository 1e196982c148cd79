"""Gemma 1, 2 and 3: norms hold what the checkpoint has with one added."""

from kvrun.gguf.architecture import RMS, Architecture, Config, register
from kvrun.gguf.architectures.llama import AT, ATTENTION, ENDS, FEED, LAYERS
from kvrun.gguf.architectures.qwen import HEAD_NORMS
from kvrun.gguf.container import Container

SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NORMS = ("output_norm", *SANDWICH, *HEAD_NORMS)
GELU = {"hidden_act": "gelu_pytorch_tanh"}
WINDOWED = {**RMS, "sliding_window": "attention.sliding_window", "final_logit_softcapping": "final_logit_softcapping"}
# The largest of each generation scales scores by its width per head, all others by the heads' own width; no file says so.
BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def scores(container: Container, config: Config) -> Config:
    """What scores are scaled by, told by the number of layers."""
    by_width = config["num_hidden_layers"] == BY_WIDTH[container.architecture]
    return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]}


def gemma3(container: Container, config: Config) -> Config:
    """Scores as above, and which layers see their window only."""
    pattern = container.field("{arch}.attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        return {**scores(container, config), "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern]}
    return {**scores(container, config), "sliding_window_pattern": pattern}


register(
    Architecture("gemma", "GemmaForCausalLM", ENDS, AT, LAYERS, RMS, GELU, more=NORMS),
    Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        ENDS,
        AT,
        {**SANDWICH, **ATTENTION, **FEED},
        {**WINDOWED, "attn_logit_softcapping": "attn_logit_softcapping"},
        GELU,
        scores,
        more=NORMS,
    ),
    Architecture(
        "gemma3",
        "Gemma3ForCausalLM",
        ENDS,
        AT,
        {**SANDWICH, **ATTENTION, **FEED, **HEAD_NORMS},
        {**WINDOWED, "rope_local_base_freq": "rope.freq_base_swa"},
        GELU,
        gemma3,
        more=NORMS,
    ),
)
