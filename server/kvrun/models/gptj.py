"""GPT-J: one norm for attention and feed-forward, which run side by side; a head with a bias."""

from kvrun.spec import Attention, Config, Decoder, Embed, Head, LayerNorm, Mlp, Model, Residual, Rope, architecture, fuse, linear, stack


@architecture("GPTJForCausalLM")
def gptj(c: Config) -> Model:
    """GPT-J; the first `rotary_dim` values of every head are rotated in neighbouring pairs."""
    heads, eps = c.num_attention_heads, c.layer_norm_eps
    head_dim = c.hidden_size // heads
    attention = Attention(
        heads,
        heads,
        head_dim,
        qkv=fuse("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        out=linear("attn.out_proj"),
        position=Rope(c.get("rotary_dim", head_dim), 10_000.0, style="interleaved"),
    )
    mlp = Mlp(
        c.get("intermediate_size", 4 * c.hidden_size),
        act=c.get("hidden_act", "gelu_new"),
        up=linear("mlp.fc_in", bias=True),
        down=linear("mlp.fc_out", bias=True),
    )
    return Model(
        Decoder(
            embed=Embed("transformer.wte", c.vocab_size, c.hidden_size),
            layers=stack(c.num_hidden_layers, "transformer.h.{i}", [Residual(LayerNorm("ln_1", eps), attention, mlp)]),
            head=Head(LayerNorm("transformer.ln_f", eps), "lm_head", tied=c.get("tie_word_embeddings", False), bias=True),
        ),
        positions=c.max_position_embeddings,
        leftovers=(r"\.attn\.(masked_)?bias$",),
    )
