"""EXAONE 4, with windows and without."""

from tiny.row import LLAMA, Row

ROWS = {
    "exaone4": Row("exaone4", {**LLAMA, "sliding_window": 8, "sliding_window_pattern": 4, "num_hidden_layers": 4}),
    "exaone4_everywhere": Row("exaone4", {**LLAMA, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
}
