"""Granite."""

from tiny.row import LLAMA, Row

MULTIPLIERS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.4, "logits_scaling": 8.0}

ROWS = {
    "granite": Row("granite", {**LLAMA, **MULTIPLIERS, "tie_word_embeddings": True}),
}
