"""Phi 3.5 MoE."""

from tiny.row import LLAMA, Row

ROWS = {
    "phimoe": Row(
        "phimoe",
        {
            **LLAMA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.2,
        },
    ),
}
