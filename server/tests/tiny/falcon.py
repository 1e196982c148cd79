"""Falcon of every age."""

from tiny.row import COMMON, SHAPE, Row

FALCON = {**COMMON, **SHAPE, "alibi": False, "parallel_attn": True, "bias": False}
RW = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}

ROWS = {
    "falcon7b": Row("falcon", {**FALCON, "new_decoder_architecture": False, "multi_query": True}, seed=33),
    "falcon40b": Row("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon11b": Row("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, seed=32),
    # The eager path adds the alibi bias of this family twice.
    "falcon_rw": Row("falcon", {**FALCON, **RW}, attention="sdpa", seed=6),
}
