"""OPT and Galactica."""

from tiny.row import COMMON, SHAPE, Row

OPT = {**COMMON, **SHAPE, "ffn_dim": 96, "word_embed_proj_dim": 64}
GALACTICA = {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"}

ROWS = {
    "opt": Row("opt", OPT, seed=3),
    "opt_350m": Row("opt", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "galactica": Row("opt", {**OPT, **GALACTICA}, seed=14),
}
