"""OLMo 2 and 3."""

from tiny.row import LLAMA, Row

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 5e5}, "full_attention": YARN}

ROWS = {
    "olmo2": Row("olmo2", LLAMA),
    "olmo2_six_heads": Row("olmo2", {**LLAMA, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "olmo3": Row("olmo3", {**LLAMA, "sliding_window": 8, "num_hidden_layers": 4, "rope_parameters": ROPES}),
}
