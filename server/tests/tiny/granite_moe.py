"""Granite with mixtures of experts."""

from tiny.row import LLAMA, Row

MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 2.0}

ROWS = {"granite_moe": Row("granitemoe", {**LLAMA, **MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2}, seed=30)}
