"""GPT-2."""

from tiny.row import COMMON, Row

GPT2 = {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}

ROWS = {
    "gpt2": Row("gpt2", GPT2),
    "gpt2_by_layer": Row("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 80}),
}
