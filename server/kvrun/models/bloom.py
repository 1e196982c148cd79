"""BLOOM: biased layer norms everywhere, one of them on the embedding, and positions by attention slopes."""

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
    Residual,
    architecture,
    linear,
    packed,
    stack,
)


@architecture("BloomForCausalLM")
def bloom(c: Config) -> Model:
    """BLOOM and BLOOMZ of any size."""
    c.only("apply_residual_connection_post_layernorm", False)
    heads, eps = c.num_attention_heads, c.layer_norm_eps
    attention = Attention(
        heads,
        heads,
        c.hidden_size // heads,
        qkv=packed("self_attention.query_key_value", "per_group", bias=True),
        out=linear("self_attention.dense", bias=True),
        position=Alibi(),
    )
    mlp = Mlp(
        4 * c.hidden_size,
        act="gelu_new",
        up=linear("mlp.dense_h_to_4h", bias=True),
        down=linear("mlp.dense_4h_to_h", bias=True),
    )
    layers = stack(
        c.num_hidden_layers,
        "transformer.h.{i}",
        [Residual(LayerNorm("input_layernorm", eps), attention), Residual(LayerNorm("post_attention_layernorm", eps), mlp)],
    )
    norm = LayerNorm("transformer.word_embeddings_layernorm", eps)
    return Model(
        Decoder(
            embed=Embed("transformer.word_embeddings", c.vocab_size, c.hidden_size, norm=norm),
            layers=layers,
            head=Head(LayerNorm("transformer.ln_f", eps), "lm_head", tied=c.get("tie_word_embeddings", True)),
        ),
        positions=c.get("seq_length", 0),  # slopes reach further than any training did
    )
