"""Gemma 2: Gemma with norms on both sides of every part, scores and logits capped, and a window on every other layer."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvrun.models.gemma import feed, norm, scaled
from kvrun.models.llama import attention
from kvrun.spec import Attention, Config, Model, Residual, Step, architecture


@architecture("Gemma2ForCausalLM")
def gemma2(c: Config) -> Model:
    """Gemma 2 of any size."""
    c = c.otherwise(query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096)
    return sandwich(c, lambda i: attend(c, slides=c.slides(i, every=2)))


def attend(c: Config, *, slides: bool) -> Attention:
    """The attention of a layer that sees its window, or everything."""
    bias = c.get("attention_bias", False)
    return replace(
        attention(c, qkv_bias=bias, out_bias=bias, window=c.sliding_window if slides else None),
        scale=c.query_pre_attn_scalar**-0.5,
        softcap=c.get("attn_logit_softcapping"),
    )


def sandwich(c: Config, attend: Callable[[int], Attention]) -> Model:
    """Every part between two norms; `attend` says the attention of layer i."""
    c.only("use_bidirectional_attention", False)

    def layer(i: int) -> Sequence[Step]:
        return [
            Residual(norm(c, "input_layernorm"), attend(i), after=norm(c, "post_attention_layernorm")),
            Residual(norm(c, "pre_feedforward_layernorm"), feed(c), after=norm(c, "post_feedforward_layernorm")),
        ]

    return scaled(c, layer)
