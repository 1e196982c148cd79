"""Llama, Mistral and Qwen 2."""

from tiny.row import LLAMA, Row, rope

LLAMA3 = rope("llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)

ROWS = {
    "llama": Row("llama", LLAMA, seed=16),
    "llama_tied": Row("llama", {**LLAMA, **LLAMA3, "tie_word_embeddings": True}, seed=5),
    "llama_multi_head": Row("llama", {**LLAMA, "num_key_value_heads": 4, "head_dim": 24}, seed=8),
    "llama_biased": Row("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_size": 96, "num_attention_heads": 6}, seed=73),
    "llama_linear": Row("llama", {**LLAMA, **rope("linear", factor=2.0)}, seed=12),
    "llama_yarn": Row("llama", {**LLAMA, **YARN}, seed=61),
    "llama_dynamic": Row("llama", {**LLAMA, **rope("dynamic", factor=2.0)}, seed=16),
    "mistral": Row("mistral", {**LLAMA, "sliding_window": 8, "head_dim": 16}, seed=3),
    "qwen2": Row("qwen2", LLAMA, seed=42),
    "qwen2_windowed": Row("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
}
