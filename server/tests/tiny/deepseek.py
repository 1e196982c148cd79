"""DeepSeek V2 and V3, and GLM 4.5."""

from tiny.row import LLAMA, Row, rope

GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 48}
PART = {**LLAMA, **GROUPS, "num_key_value_heads": 4, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
LATENT = {**PART, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.0)

ROWS = {
    "deepseek_v2": Row("deepseek_v2", {**LATENT, "n_shared_experts": 2, "topk_method": "group_limited_greedy"}, seed=1396),
    "deepseek_v2_lite": Row(
        "deepseek_v2", {**LATENT, **YARN, "q_lora_rank": None, "n_shared_experts": 1, "topk_method": "greedy"}, seed=1271
    ),
    "deepseek_v3": Row("deepseek_v3", {**LATENT, **YARN, "n_shared_experts": 1}, seed=16),
    "deepseek_v3_half": Row("deepseek_v3", {**LATENT, "n_shared_experts": 1, "rope_interleave": False, "norm_topk_prob": False}, seed=16),
    "glm4_moe": Row(
        "glm4_moe", {**PART, "num_key_value_heads": 2, "n_shared_experts": 1, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}
    ),
}
