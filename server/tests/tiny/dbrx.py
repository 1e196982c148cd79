"""DBRX."""

from tiny.row import COMMON, Row

ATTENTION = {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4}
FEED = {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}
DBRX = {**COMMON, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "attn_config": ATTENTION, "ffn_config": FEED}

ROWS = {
    "dbrx": Row("dbrx", DBRX, seed=1),
    "dbrx_plain_weights": Row("dbrx", {**DBRX, "ffn_config": {**FEED, "moe_normalize_expert_weights": None}}, seed=1),
}
