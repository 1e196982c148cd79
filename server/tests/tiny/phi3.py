"""Phi 3 and 4."""

from tiny.row import LLAMA, Row, rope

PHI3 = {**LLAMA, "sliding_window": None}

ROWS = {
    "phi3": Row("phi3", {**PHI3, "sliding_window": 8}),
    "phi4_mini": Row("phi3", {**PHI3, **rope("default", partial_rotary_factor=0.75), "tie_word_embeddings": True}),
}
