"""GPT-NeoX and GPT-J."""

from tiny.row import COMMON, SHAPE, Row

NEOX = {**COMMON, **SHAPE, "intermediate_size": 96, "rotary_pct": 0.25}

ROWS = {
    "gpt_neox": Row("gpt_neox", NEOX),
    "gpt_neox_sequential": Row("gpt_neox", {**NEOX, "use_parallel_residual": False, "attention_bias": False}, seed=6),
    "gptj": Row("gptj", {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8}, seed=3),
}
