"""Command R, Command R+, and Command R7B."""

from tiny.row import LLAMA, Row

COHERE = {**LLAMA, "tie_word_embeddings": True, "logit_scale": 0.25}

ROWS = {
    "cohere": Row("cohere", COHERE),
    "cohere_plus": Row("cohere", {**COHERE, "use_qk_norm": True}),
    "cohere2": Row("cohere2", {**COHERE, "sliding_window": 8, "num_hidden_layers": 4}),
}
