"""Qwen 2 and 3 with mixtures of experts, and OLMoE."""

from tiny.row import LLAMA, Row

MOE = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}
QWEN = {**MOE, "moe_intermediate_size": 48}

ROWS = {
    "qwen2_moe": Row("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 80}, seed=651),
    "qwen2_moe_sparse": Row(
        "qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "norm_topk_prob": True}, seed=23
    ),
    "qwen3_moe": Row("qwen3_moe", {**QWEN, "num_experts": 7, "num_experts_per_tok": 3, "head_dim": 32, "norm_topk_prob": True}, seed=1),
    "qwen3_moe_mixed": Row("qwen3_moe", {**QWEN, "mlp_only_layers": [0], "head_dim": 32}),
    "olmoe": Row("olmoe", {**MOE, "num_key_value_heads": 4, "eos_token_id": 2}),
    "olmoe_clipped": Row("olmoe", {**MOE, "num_key_value_heads": 4, "eos_token_id": 2, "clip_qkv": 0.5}),
}
