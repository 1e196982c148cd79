"""SmolLM 3."""

from tiny.row import LLAMA, Row

ROWS = {
    "smollm3": Row("smollm3", {**LLAMA, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "smollm3_windowed": Row("smollm3", {**LLAMA, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 8}),
}
