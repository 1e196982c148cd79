"""Llama 2 and 3, and the many that share their shape."""

from collections.abc import Callable, Sequence

from kvrun.spec import Attention, Config, Decoder, Embed, GatedMlp, Head, Mixer, Model, Residual, RmsNorm, Step, architecture, stack
from kvrun.spec.weights import fuse, linear


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


def feed_forward(c: Config) -> GatedMlp:
    """The gated feed-forward part."""
    bias = c.get("mlp_bias", False)
    gate_up, down = fuse("mlp.gate_proj", "mlp.up_proj", bias=bias), linear("mlp.down_proj", bias=bias)
    return GatedMlp(c.intermediate_size, c.hidden_act, gate_up, down)


def decoder(c: Config, attend: Callable[[int], Attention], feed: Callable[[int], Mixer] | None = None) -> Model:
    """A pre-norm stack; `attend` says the attention of layer i, and `feed` its feed-forward part where that is not Llama's."""

    def layer(i: int) -> Sequence[Step]:
        return [
            Residual(RmsNorm("input_layernorm", c.rms_norm_eps), attend(i)),
            Residual(RmsNorm("post_attention_layernorm", c.rms_norm_eps), feed_forward(c) if feed is None else feed(i)),
        ]

    return language_model(c, layer)


def language_model(c: Config, layer: Callable[[int], Sequence[Step]], head: Head | None = None, *, embedding_scale: float = 1.0) -> Model:
    """Layers under Llama's names, with an RMS norm before a head that is tied if the config says so, or with a head of their own."""
    if head is None:
        head = Head(RmsNorm("model.norm", c.rms_norm_eps), "lm_head", tied=c.get("tie_word_embeddings", False))
    return Model(
        Decoder(
            embed=Embed("model.embed_tokens", c.vocab_size, c.hidden_size, scale=embedding_scale),
            layers=stack(c.num_hidden_layers, "model.layers.{i}", layer),
            head=head,
        ),
        positions=c.max_position_embeddings,
        leftovers=(r"\.rotary_emb\.inv_freq$",),
    )
