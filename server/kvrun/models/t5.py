"""T5, T5 v1.1 and Flan-T5: an encoder that reads the prompt, and a decoder that looks at it while it writes."""

from kvrun.spec import (
    Attention,
    Config,
    CrossAttention,
    Decoder,
    Embed,
    Encoder,
    GatedMlp,
    Head,
    Layer,
    Mlp,
    Model,
    RelativeBias,
    Residual,
    RmsNorm,
    SourceAttention,
    TwoSidedBias,
    architecture,
    stack,
)
from kvrun.spec.weights import fuse, linear


@architecture("T5ForConditionalGeneration")
def t5(c: Config) -> Model:
    """T5 of any size and generation."""
    heads, dim, eps = c.num_heads, c.d_kv, c.layer_norm_eps
    bias = "{}.block.0.layer.0.SelfAttention.relative_attention_bias"
    buckets = c.get("relative_attention_num_buckets", 32), c.get("relative_attention_max_distance", 128)

    def norm(i: int) -> RmsNorm:
        return RmsNorm(f"layer.{i}.layer_norm", eps)

    # No scale: it was trained into the queries.
    own = fuse(*(f"layer.0.SelfAttention.{part}" for part in "qkv")), linear("layer.0.SelfAttention.o")
    reads = SourceAttention(heads, heads, dim, *own, position=TwoSidedBias(bias.format("encoder"), *buckets), scale=1.0)
    writes = Attention(heads, heads, dim, *own, position=RelativeBias(bias.format("decoder"), *buckets), scale=1.0)
    other = "layer.1.EncDecAttention"
    query, out = linear(f"{other}.q"), linear(f"{other}.o")
    looks = CrossAttention(heads, heads, dim, query, fuse(f"{other}.k", f"{other}.v"), out, scale=1.0)

    def layers(side: str, count: int, *mixers: Attention | CrossAttention) -> tuple[Layer, ...]:
        last = len(mixers)
        steps = [*(Residual(norm(i), mixer) for i, mixer in enumerate(mixers)), Residual(norm(last), _feed_forward(c, last))]
        return stack(count, f"{side}.block.{{i}}", steps)

    tied = c.get("tie_word_embeddings", True)
    scaled = c.get("scale_decoder_outputs", tied)  # the newer name of what the older configs say by tying
    return Model(
        Decoder(
            embed=Embed("shared", c.vocab_size, c.d_model),
            layers=layers("decoder", c.get("num_decoder_layers", c.num_layers), writes, looks),
            head=Head(RmsNorm("decoder.final_layer_norm", eps), "lm_head", tied=tied, scale=c.d_model**-0.5 if scaled else 1.0),
        ),
        positions=0,  # of its own: distances beyond the last bucket are all the same to it
        leftovers=(r"^(en|de)coder\.embed_tokens\.weight$", r"\.EncDecAttention\.relative_attention_bias\.weight$"),
        encoder=Encoder(layers("encoder", c.num_layers, reads), RmsNorm("encoder.final_layer_norm", eps)),
        start=c.get("decoder_start_token_id", c.generation.get("decoder_start_token_id", c.get("pad_token_id", 0))),
        magnitude=1e5,
    )


def _feed_forward(c: Config, number: int) -> GatedMlp | Mlp:
    at = f"layer.{number}.DenseReluDense"
    gate, _, act = c.get("feed_forward_proj", "relu").rpartition("-")
    if gate == "gated":
        return GatedMlp(c.d_ff, "gelu_new" if act == "gelu" else act, fuse(f"{at}.wi_0", f"{at}.wi_1"), linear(f"{at}.wo"))
    return Mlp(c.d_ff, act, linear(f"{at}.wi"), linear(f"{at}.wo"))
