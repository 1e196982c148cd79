"""Mixtral."""

from tiny.row import LLAMA, Row

ROWS = {
    "mixtral": Row("mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, seed=2566),
    "mixtral_windowed": Row("mixtral", {**LLAMA, "num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 8}, seed=110),
}
