"""DBRX: layer norms without bias, query, key and value clipped, and experts that lie below each other in three tensors."""

from kvrun.spec import (
    Attention,
    Config,
    Decoder,
    Embed,
    FlatExperts,
    Head,
    LayerNorm,
    Model,
    Moe,
    Residual,
    SoftmaxTopK,
    TopKSoftmax,
    architecture,
    linear,
    packed,
    stack,
)

EPS = 1e-5  # of torch's layer norm; no config says it


@architecture("DbrxForCausalLM")
def dbrx(c: Config) -> Model:
    """DBRX 132B."""
    attend, feed = c.within("attn_config"), c.within("ffn_config").otherwise(moe_normalize_expert_weights=1.0)
    feed.only("moe_normalize_expert_weights", None, 1.0)  # the power of the norm that they are divided by
    heads, head_dim, power = c.num_attention_heads, c.hidden_size // c.num_attention_heads, feed.get("moe_normalize_expert_weights")
    attention = Attention(
        heads,
        attend.get("kv_n_heads", 1),
        head_dim,
        qkv=packed("norm_attn_norm.attn.Wqkv"),
        out=linear("norm_attn_norm.attn.out_proj"),
        position=c.otherwise(rope_theta=attend.get("rope_theta", 1e4)).rope(head_dim),
        clip=attend.get("clip_qkv"),
    )
    top = feed.get("moe_top_k", 1)
    moe = Moe(
        feed.get("moe_num_experts", 4),
        feed.get("ffn_hidden_size", 3584),
        act=feed.get("ffn_act_fn", {}).get("name", "silu"),
        router=SoftmaxTopK(top) if power is None else TopKSoftmax(top),
        logits=linear("ffn.router.layer"),
        layout=FlatExperts("ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"),
    )

    def norm(name: str) -> LayerNorm:
        return LayerNorm(name, EPS, bias=False)

    steps = [Residual(norm("norm_attn_norm.norm_1"), attention), Residual(norm("norm_attn_norm.norm_2"), moe)]
    return Model(
        Decoder(
            embed=Embed("transformer.wte", c.vocab_size, c.hidden_size),
            layers=stack(c.num_hidden_layers, "transformer.blocks.{i}", steps),
            head=Head(norm("transformer.norm_f"), "lm_head", tied=c.get("tie_word_embeddings", False)),
        ),
        positions=c.max_position_embeddings,
    )
