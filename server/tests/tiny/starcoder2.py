"""StarCoder 2."""

from tiny.row import LLAMA, Row

STARCODER2 = {**LLAMA, "sliding_window": 8, "hidden_act": "gelu_pytorch_tanh"}

ROWS = {
    "starcoder2": Row("starcoder2", {**STARCODER2, "tie_word_embeddings": True}, seed=1),
    "starcoder2_unbiased": Row("starcoder2", {**STARCODER2, "use_bias": False, "tie_word_embeddings": False}, seed=1),
}
