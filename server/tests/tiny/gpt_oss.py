"""gpt-oss."""

from tiny.row import LLAMA, Row, rope

YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False, beta_fast=32.0, beta_slow=1.0)
GPT_OSS = {**LLAMA, **YARN, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}

ROWS = {"gpt_oss": Row("gpt_oss", GPT_OSS, seed=108)}
