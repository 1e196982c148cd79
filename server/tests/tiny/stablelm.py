"""StableLM."""

from tiny.row import LLAMA, Row

STABLELM = {**LLAMA, "num_key_value_heads": 4}

ROWS = {
    "stablelm": Row("stablelm", {**STABLELM, "use_qkv_bias": True}, seed=1),
    "stablelm_parallel": Row("stablelm", {**LLAMA, "use_parallel_residual": True, "qk_layernorm": True}),
}
