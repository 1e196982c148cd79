"""BLOOM and MPT."""

from tiny.row import COMMON, Row

MPT = {**COMMON, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 4}

ROWS = {
    "bloom": Row("bloom", {**COMMON, "hidden_size": 64, "n_layer": 2, "n_head": 4}, seed=49),
    # Five heads: the slopes of a number that is no power of two.
    "bloom_5_heads": Row("bloom", {**COMMON, "hidden_size": 80, "n_layer": 2, "n_head": 5}, seed=57),
    "mpt": Row("mpt", {**MPT, "attn_config": {"alibi": True, "qk_ln": False, "clip_qkv": None}}, seed=42),
    "mpt_clipped": Row("mpt", {**MPT, "attn_config": {"alibi": True, "clip_qkv": 0.2, "softmax_scale": 0.3}}),
}
