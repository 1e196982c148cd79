"""Falcon 7B, 11B, 40B and 180B, and Falcon-RW: attention and feed-forward side by side, or one after the other in RW."""

from kvrun.spec import (
    Alibi,
    Attention,
    Config,
    Decoder,
    Embed,
    Head,
    LayerNorm,
    Mlp,
    Model,
    Parallel,
    Residual,
    Step,
    architecture,
    linear,
    packed,
    stack,
)


@architecture("FalconForCausalLM", "RWForCausalLM")
def falcon(c: Config) -> Model:
    """Falcon of any size and age."""
    grouped = c.get("new_decoder_architecture", c.get("model_type") == "RefinedWeb")
    heads, bias, eps = c.num_attention_heads, c.get("bias", False), c.layer_norm_eps
    head_dim = c.hidden_size // heads
    kv_heads = c.get("num_key_value_heads", heads) if grouped else 1 if c.get("multi_query", True) else heads
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        qkv=packed("self_attention.query_key_value", "per_group", bias=bias),
        out=linear("self_attention.dense", bias=bias),
        # The slopes are added before the scores are scaled, so they are scaled with them.
        position=Alibi(head_dim**-0.5) if c.get("alibi", False) else c.rope(head_dim),
    )
    mlp = Mlp(
        c.get("intermediate_size", 4 * c.hidden_size),
        act=c.get("hidden_act", "gelu"),
        up=linear("mlp.dense_h_to_4h", bias=bias),
        down=linear("mlp.dense_4h_to_h", bias=bias),
    )
    return Model(
        Decoder(
            embed=Embed("transformer.word_embeddings", c.vocab_size, c.hidden_size),
            layers=stack(c.num_hidden_layers, "transformer.h.{i}", _steps(c, grouped, attention, mlp)),
            head=Head(LayerNorm("transformer.ln_f", eps), "lm_head", tied=c.get("tie_word_embeddings", True)),
        ),
        positions=c.get("max_position_embeddings", 2048),
        leftovers=(r"\.rotary_emb\.inv_freq$",),
    )


def _steps(c: Config, grouped: bool, attention: Attention, mlp: Mlp) -> list[Step]:
    eps = c.layer_norm_eps
    if grouped and c.get("num_ln_in_parallel_attn", 2) == 2:
        return [Parallel(Residual(LayerNorm("ln_attn", eps), attention), Residual(LayerNorm("ln_mlp", eps), mlp))]
    first = LayerNorm("input_layernorm", eps)
    if grouped or c.get("parallel_attn", True):
        return [Residual(first, attention, mlp)]
    return [Residual(first, attention), Residual(LayerNorm("post_attention_layernorm", eps), mlp)]
