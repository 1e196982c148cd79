"""Qwen 3."""

from tiny.row import LLAMA, Row

QWEN3 = {**LLAMA, "head_dim": 24}

ROWS = {
    "qwen3": Row("qwen3", QWEN3),
    "qwen3_windowed": Row("qwen3", {**QWEN3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
}
