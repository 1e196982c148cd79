"""MPT: layer norms without bias, positions by attention slopes, queries, keys and values that may be clipped."""

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


@architecture("MptForCausalLM", "MPTForCausalLM")
def mpt(c: Config) -> Model:
    """MPT of any size."""
    a = c.within("attn_config")
    a.only("alibi", True)
    a.only("qk_ln", False)
    a.only("alibi_bias_max", 8)
    c.only("no_bias", True)
    c.only("logit_scale")
    heads, eps = c.num_attention_heads, c.get("layer_norm_eps", 1e-5)
    attention = Attention(
        heads,
        heads,
        c.hidden_size // heads,
        qkv=packed("attn.Wqkv"),
        out=linear("attn.out_proj"),
        position=Alibi(),
        scale=a.get("softmax_scale"),
        clip=a.get("clip_qkv"),
    )
    width = int(c.get("expansion_ratio", 4) * c.hidden_size)
    mlp = Mlp(width, act="gelu", up=linear("ffn.up_proj"), down=linear("ffn.down_proj"))
    layers = stack(
        c.num_hidden_layers,
        "transformer.blocks.{i}",
        [
            Residual(LayerNorm("norm_1", eps, bias=False), attention),
            Residual(LayerNorm("norm_2", eps, bias=False), mlp),
        ],
    )
    return Model(
        Decoder(
            embed=Embed("transformer.wte", c.vocab_size, c.hidden_size),
            layers=layers,
            head=Head(LayerNorm("transformer.norm_f", eps, bias=False), "lm_head", tied=c.get("tie_word_embeddings", True)),
        ),
        positions=c.max_position_embeddings,
    )
