"""Phi 1.5 and 2."""

from tiny.row import LLAMA, Row, rope

PHI = {**LLAMA, "num_key_value_heads": 4, "hidden_act": "gelu_new"}

ROWS = {
    "phi": Row("phi", {**PHI, **rope("default", partial_rotary_factor=0.5)}),
    "phi_normed_heads": Row("phi", {**PHI, **rope("default", partial_rotary_factor=0.4), "qk_layernorm": True}),
}
