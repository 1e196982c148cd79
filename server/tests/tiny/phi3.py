"""Phi 3 and 4."""

from tiny.row import LLAMA, Row, rope

PHI3 = {**LLAMA, "sliding_window": None}
LONGROPE = rope(
    "longrope",
    short_factor=[1.0 + 0.1 * i for i in range(6)],
    long_factor=[1.0 + 2.0 * i for i in range(6)],
    original_max_position_embeddings=32,
    partial_rotary_factor=0.75,
)

ROWS = {
    "phi3": Row("phi3", {**PHI3, "sliding_window": 8}, seed=10),
    "phi3_longrope": Row("phi3", {**PHI3, **LONGROPE, "original_max_position_embeddings": 32}, seed=69),
    "phi4_mini": Row("phi3", {**PHI3, **rope("default", partial_rotary_factor=0.75), "tie_word_embeddings": True}, seed=2),
}
