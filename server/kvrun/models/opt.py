"""OPT and Galactica: learned positions that begin at row 2, and biases and norm vectors that some sizes go without."""

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
    PostNorm,
    Residual,
    Step,
    architecture,
    fuse,
    linear,
    stack,
)

OFFSET = 2  # rows of the position table before that of position 0


@architecture("OPTForCausalLM")
def opt(c: Config) -> Model:
    """OPT; the 350M size normalises after each sum, and embeds in fewer numbers than it computes with."""
    heads, bias, first = c.num_attention_heads, c.get("enable_bias", True), c.get("do_layer_norm_before", True)
    width = c.get("word_embed_proj_dim", c.hidden_size)
    narrow = width != c.hidden_size
    attention = Attention(
        heads,
        heads,
        c.hidden_size // heads,
        qkv=fuse("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", bias=bias),
        out=linear("self_attn.out_proj", bias=bias),
    )
    mlp = Mlp(c.intermediate_size, act=c.get("hidden_act", "relu"), up=linear("fc1", bias=bias), down=linear("fc2", bias=bias))
    before, after = _norm(c, "self_attn_layer_norm"), _norm(c, "final_layer_norm")
    steps: list[Step] = [Residual(before, attention), Residual(after, mlp)]
    if not first:
        steps = [PostNorm(before, attention), PostNorm(after, mlp)]
    last = _norm(c, "model.decoder.final_layer_norm") if first and not c.get("_remove_final_layer_norm", False) else None
    return Model(
        Decoder(
            embed=Embed(
                "model.decoder.embed_tokens",
                c.vocab_size,
                c.hidden_size,
                position=Learned("model.decoder.embed_positions", c.max_position_embeddings + OFFSET, OFFSET),
                project=linear("model.decoder.project_in") if narrow else None,
                width=width if narrow else None,
            ),
            layers=stack(c.num_hidden_layers, "model.decoder.layers.{i}", steps),
            head=Head(
                last,
                "lm_head",
                tied=c.get("tie_word_embeddings", True),
                project=linear("model.decoder.project_out") if narrow else None,
            ),
        ),
        positions=c.max_position_embeddings,
    )


def _norm(c: Config, name: str) -> LayerNorm:
    affine = c.get("layer_norm_elementwise_affine", True)
    return LayerNorm(name, 1e-5, weight=affine, bias=affine)
