"""DeepSeek V2, V3 and R1: latent attention, experts in groups, and leading layers without them."""

from kvrun.gguf.architecture import SHAPE, Architecture, Config, register
from kvrun.gguf.architectures.llama import AT, ENDS, FEED, NORMS
from kvrun.gguf.architectures.qwen import EXPERTS
from kvrun.gguf.container import Container

LATENT = {
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",  # in the first files; later ones have its keys and values apart
    "attn_k_b": "self_attn.kv_b_proj.keys",
    "attn_v_b": "self_attn.kv_b_proj.values",
    "attn_output": "self_attn.o_proj",
}
SHARED = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
KEYS = {
    **SHAPE,
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "rope.dimension_count",
    "qk_rope_head_dim": "rope.dimension_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
}
SIGMOID = 2  # expert_gating_func; the first files do not state it, and take a softmax


def deepseek(container: Container, config: Config) -> Config:
    """Widths of heads, and V3 where experts are chosen by sigmoids."""

    def width(of: str) -> int:
        # What attention over latents would call so is stated without the suffix, beside it.
        own = container.metadata.get(f"{container.architecture}.attention.{of}_length_mla")
        return int(container.field(f"{{arch}}.attention.{of}_length") if own is None else own)

    found: Config = {
        "num_key_value_heads": config["num_attention_heads"],
        "qk_nope_head_dim": width("key") - config["qk_rope_head_dim"],
        "v_head_dim": width("value"),
        "norm_topk_prob": config.get("norm_topk_prob", False),
    }
    if container.metadata.get(f"{container.architecture}.expert_gating_func") == SIGMOID:
        return {**found, "architectures": ["DeepseekV3ForCausalLM"]}
    return {**found, "topk_method": "group_limited_greedy" if config.get("n_group", 1) > 1 else "greedy"}


register(
    Architecture(
        "deepseek2",
        "DeepseekV2ForCausalLM",
        ENDS,
        AT,
        {**NORMS, **LATENT, **FEED, **EXPERTS, **SHARED, "exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
        KEYS,
        {"hidden_act": "silu"},
        deepseek,
    ),
)
