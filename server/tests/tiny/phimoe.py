"""Phi 3.5 MoE."""

from tiny.row import LLAMA, Row

PHIMOE = {
    **LLAMA,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
    "router_jitter_noise": 0.2,
}
# transformers turns its long sequences with the factors of short ones, so those are no row.
ROWS = {"phimoe": Row("phimoe", PHIMOE, seed=6)}
