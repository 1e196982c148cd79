"""The latent attention of DeepSeek V2 and V3, which others have taken over."""

import math

from kvrun.spec import Config, Fused, LatentAttention, LowRank, RmsNorm, linear

EPS = 1e-6  # of the norms within attention, whatever the config says of the others


def attend(c: Config) -> LatentAttention:
    """The attention of any layer."""
    plain, rotated, value, latent = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    bias, narrow = c.get("attention_bias", False), c.get("q_lora_rank")
    query: Fused | LowRank = linear("self_attn.q_proj")
    if narrow is not None:
        norm = RmsNorm("self_attn.q_a_layernorm", EPS)
        query = LowRank(narrow, linear("self_attn.q_a_proj", bias=bias), norm, linear("self_attn.q_b_proj"))
    return LatentAttention(
        c.num_attention_heads,
        plain,
        rotated,
        value,
        latent,
        query,
        down=linear("self_attn.kv_a_proj_with_mqa", bias=bias),
        norm=RmsNorm("self_attn.kv_a_layernorm", EPS),
        up=linear("self_attn.kv_b_proj"),
        out=linear("self_attn.o_proj", bias=bias),
        position=c.rope(rotated, "interleaved" if c.get("rope_interleave", True) else "half"),
        scale=(plain + rotated) ** -0.5 * _stretch(c) ** 2,
    )


def _stretch(c: Config) -> float:
    """What a stretched context multiplies queries and keys with."""
    stated = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    factor, power = stated.get("factor", 1.0), stated.get("mscale_all_dim", 0.0)
    return 0.1 * power * math.log(factor) + 1.0 if factor > 1 else 1.0
