"""Gemma 1, 2 and 3."""

from tiny.row import LLAMA, Row

GEMMA = {**LLAMA, "head_dim": 24, "tie_word_embeddings": True}
# Caps so small that a tiny model feels them, and a scale that is not the heads' own.
GEMMA2 = {**GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
GEMMA3 = {**GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 40, "rope_parameters": ROPES, "num_hidden_layers": 3}

ROWS = {
    "gemma": Row("gemma", {**GEMMA, "num_key_value_heads": 1}, seed=27),
    "gemma2": Row("gemma2", {**GEMMA2, "num_hidden_layers": 3}),
    "gemma3": Row("gemma3_text", {**GEMMA3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma3_five_to_one": Row("gemma3_text", {**GEMMA3, "num_hidden_layers": 6, "hidden_size": 32, "intermediate_size": 48}),
}
