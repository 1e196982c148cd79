"""SmolLM 3."""

from tiny.row import LLAMA, Row

ROWS = {
    "smollm3": Row("smollm3", {**LLAMA, "no_rope_layer_interval": 2, "tie_word_embeddings": True}, seed=7),
    "smollm3_windowed": Row("smollm3", {**LLAMA, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 8}),
}
