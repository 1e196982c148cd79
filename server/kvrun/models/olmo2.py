"""OLMo 2: Llama's shape with the norms after each part instead of before, and all query heads and all key heads normalised as one."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvrun.models.llama import attention, feed_forward, language_model
from kvrun.spec import Attention, Config, Model, ProjectionNorm, Residual, RmsNorm, Step, architecture


@architecture("Olmo2ForCausalLM")
def olmo2(c: Config) -> Model:
    """OLMo 2 of any size."""
    return norms_after(c, lambda i: attend(c))


def attend(c: Config) -> Attention:
    """The attention of a layer that sees everything."""
    bias = c.get("attention_bias", False)
    norm = ProjectionNorm(RmsNorm("self_attn.q_norm", c.rms_norm_eps), RmsNorm("self_attn.k_norm", c.rms_norm_eps))
    return replace(attention(c, qkv_bias=bias, out_bias=bias), norm=norm)


def norms_after(c: Config, attend: Callable[[int], Attention]) -> Model:
    """What each part gives is normalised before it is added; `attend` says the attention of layer i."""

    def layer(i: int) -> Sequence[Step]:
        return [
            Residual(None, attend(i), after=RmsNorm("post_attention_layernorm", c.rms_norm_eps)),
            Residual(None, feed_forward(c), after=RmsNorm("post_feedforward_layernorm", c.rms_norm_eps)),
        ]

    return language_model(c, layer)
