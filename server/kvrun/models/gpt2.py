"""GPT-2: learned positions, layer norms, one plain feed-forward; every matrix stored [in, out]."""

from kvrun.spec import (
    Attention,
    Config,
    Decoder,
    Embed,
    Head,
    LayerNorm,
    Learned,
    Mlp,
    Model,
    Residual,
    architecture,
    linear,
    packed,
    stack,
    transposed,
)


@architecture("GPT2LMHeadModel")
def gpt2(c: Config) -> Model:
    """GPT-2 of any size."""
    heads = c.num_attention_heads
    head_dim = c.hidden_size // heads
    scale = head_dim**-0.5 if c.get("scale_attn_weights", True) else 1.0
    mlp = Mlp(
        c.get("intermediate_size", 4 * c.hidden_size),
        act=c.get("hidden_act", "gelu_new"),
        up=transposed(linear("mlp.c_fc", bias=True)),
        down=transposed(linear("mlp.c_proj", bias=True)),
    )

    def attention(i: int) -> Attention:
        return Attention(
            heads,
            heads,
            head_dim,
            qkv=transposed(packed("attn.c_attn", bias=True)),
            out=transposed(linear("attn.c_proj", bias=True)),
            scale=scale / (i + 1) if c.get("scale_attn_by_inverse_layer_idx", False) else scale,
        )

    layers = stack(
        c.num_hidden_layers,
        "transformer.h.{i}",
        lambda i: [
            Residual(LayerNorm("ln_1", c.layer_norm_eps), attention(i)),
            Residual(LayerNorm("ln_2", c.layer_norm_eps), mlp),
        ],
    )
    positions = Learned("transformer.wpe", c.max_position_embeddings)
    return Model(
        Decoder(
            embed=Embed("transformer.wte", c.vocab_size, c.hidden_size, position=positions),
            layers=layers,
            head=Head(LayerNorm("transformer.ln_f", c.layer_norm_eps), "lm_head", tied=c.get("tie_word_embeddings", True)),
        ),
        positions=c.max_position_embeddings,
        leftovers=(r"\.attn\.(masked_)?bias$",),  # causal masks that old checkpoints stored
    )
