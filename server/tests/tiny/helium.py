"""Helium and Seed-OSS."""

from tiny.row import LLAMA, Row

ROWS = {
    "helium": Row("helium", {**LLAMA, "head_dim": 16}, seed=79),
    "seed_oss": Row("seed_oss", {**LLAMA, "head_dim": 16, "attention_bias": True, "attention_out_bias": False}, seed=42),
}
