"""GPT-2: learned positions, layer norms, one plain feed-forward; every matrix stored [in, out]."""

from collections.abc import Callable

from kvrun.spec import (
    Attention,
    Config,
    Decoder,
    Embed,
    Fused,
    Head,
    LayerNorm,
    Learned,
    Mlp,
    Model,
    Residual,
    Stored,
    architecture,
    linear,
    packed,
    stack,
    transposed,
)


@architecture("GPT2LMHeadModel")
def gpt2(c: Config) -> Model:
    """GPT-2 of any size."""
    qkv = transposed(packed("attn.c_attn", bias=True))
    return decoder(c, qkv, lambda name: transposed(linear(name, bias=True)), kv_heads=c.num_attention_heads)


def decoder(c: Config, qkv: Stored, matrix: Callable[[str], Fused], kv_heads: int, act: str = "gelu_new") -> Model:
    """A pre-norm stack with learned positions; `matrix` says how a linear of this name is stored, `act` is what holds unsaid."""
    heads = c.num_attention_heads
    head_dim = c.hidden_size // heads
    scale = head_dim**-0.5 if c.get("scale_attn_weights", True) else 1.0
    mlp = Mlp(
        c.get("intermediate_size", 4 * c.hidden_size),
        act=c.get("hidden_act", act),
        up=matrix("mlp.c_fc"),
        down=matrix("mlp.c_proj"),
    )

    def attention(i: int) -> Attention:
        by_layer = c.get("scale_attn_by_inverse_layer_idx", False)
        return Attention(heads, kv_heads, head_dim, qkv, matrix("attn.c_proj"), scale=scale / (i + 1) if by_layer else scale)

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
