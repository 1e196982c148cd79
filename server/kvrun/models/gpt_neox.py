"""GPT-NeoX and Pythia: attention and feed-forward side by side, each with its own norm of the same input."""

from kvrun.spec import (
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
    architecture,
    linear,
    packed,
    stack,
)


@architecture("GPTNeoXForCausalLM")
def gpt_neox(c: Config) -> Model:
    """GPT-NeoX of any size; one after the other where `use_parallel_residual` is false."""
    heads, eps, bias = c.num_attention_heads, c.layer_norm_eps, c.get("attention_bias", True)
    head_dim = c.hidden_size // heads
    attention = Attention(
        heads,
        heads,
        head_dim,
        qkv=packed("attention.query_key_value", "per_group", bias=bias),
        out=linear("attention.dense", bias=bias),
        position=c.rope(head_dim),
    )
    mlp = Mlp(
        c.intermediate_size,
        act=c.get("hidden_act", "gelu"),
        up=linear("mlp.dense_h_to_4h", bias=True),
        down=linear("mlp.dense_4h_to_h", bias=True),
    )
    steps = [
        Residual(LayerNorm("input_layernorm", eps), attention),
        Residual(LayerNorm("post_attention_layernorm", eps), mlp),
    ]
    return Model(
        Decoder(
            embed=Embed("gpt_neox.embed_in", c.vocab_size, c.hidden_size),
            layers=stack(c.num_hidden_layers, "gpt_neox.layers.{i}", [Parallel(*steps)] if c.get("use_parallel_residual", True) else steps),
            head=Head(LayerNorm("gpt_neox.final_layer_norm", eps), "embed_out", tied=c.get("tie_word_embeddings", False)),
        ),
        positions=c.max_position_embeddings,
        leftovers=(r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
    )
