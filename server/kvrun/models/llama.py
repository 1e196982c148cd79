"""Llama 2 and 3, and the many that share their shape."""

from collections.abc import Callable

from kvrun.spec import Attention, Config, Decoder, Embed, GatedMlp, Head, Model, Residual, RmsNorm, architecture, fuse, linear, stack


@architecture("LlamaForCausalLM")
def llama(c: Config) -> Model:
    """Llama, its biases as the config says: attention's on all four of its matrices."""
    bias = c.get("attention_bias", False)
    return decoder(c, lambda i: attention(c, qkv_bias=bias, out_bias=bias))


def attention(c: Config, *, qkv_bias: bool = False, out_bias: bool = False, window: int | None = None) -> Attention:
    """Grouped-query attention with rotary positions."""
    return Attention(
        c.num_attention_heads,
        c.get("num_key_value_heads", c.num_attention_heads),
        c.head_dim,
        qkv=fuse("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", bias=qkv_bias),
        out=linear("self_attn.o_proj", bias=out_bias),
        position=c.rope(c.head_dim),
        window=window,
    )


def decoder(c: Config, attend: Callable[[int], Attention]) -> Model:
    """A pre-norm stack of attention and gated feed-forward; `attend` says the attention of layer i."""
    bias = c.get("mlp_bias", False)
    mlp = GatedMlp(
        c.intermediate_size,
        act=c.hidden_act,
        gate_up=fuse("mlp.gate_proj", "mlp.up_proj", bias=bias),
        down=linear("mlp.down_proj", bias=bias),
    )
    layers = stack(
        c.num_hidden_layers,
        "model.layers.{i}",
        lambda i: [
            Residual(RmsNorm("input_layernorm", c.rms_norm_eps), attend(i)),
            Residual(RmsNorm("post_attention_layernorm", c.rms_norm_eps), mlp),
        ],
    )
    return Model(
        Decoder(
            embed=Embed("model.embed_tokens", c.vocab_size, c.hidden_size),
            layers=layers,
            head=Head(RmsNorm("model.norm", c.rms_norm_eps), "lm_head", tied=c.get("tie_word_embeddings", False)),
        ),
        positions=c.max_position_embeddings,
        leftovers=(r"\.rotary_emb\.inv_freq$",),
    )
