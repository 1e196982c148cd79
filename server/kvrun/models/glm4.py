"""GLM 4: half of each head rotated, interleaved; gate and up in one matrix; in the 0414 models every part between two norms."""

from collections.abc import Sequence
from dataclasses import replace

from kvrun.models.llama import attention, decoder, language_model
from kvrun.models.phi3 import feed
from kvrun.spec import Attention, Config, Model, Residual, RmsNorm, Step, architecture

UNSTATED = {"partial_rotary_factor": 0.5, "attention_bias": True, "head_dim": 128, "rms_norm_eps": 1.5625e-7}


@architecture("GlmForCausalLM")
def glm(c: Config) -> Model:
    """GLM 4 of 2024, in Llama's order."""
    c = c.otherwise(**UNSTATED)
    return decoder(c, lambda i: attend(c), lambda i: feed(c))


@architecture("Glm4ForCausalLM")
def glm4(c: Config) -> Model:
    """GLM 4 0414, of 9 and 32 billion."""
    c = c.otherwise(**UNSTATED)

    def norm(name: str) -> RmsNorm:
        return RmsNorm(name, c.rms_norm_eps)

    def layer(i: int) -> Sequence[Step]:
        return [
            Residual(norm("input_layernorm"), attend(c), after=norm("post_self_attn_layernorm")),
            Residual(norm("post_attention_layernorm"), feed(c), after=norm("post_mlp_layernorm")),
        ]

    return language_model(c, layer)


def attend(c: Config) -> Attention:
    """The attention of any layer; its output has no bias."""
    return replace(attention(c, qkv_bias=c.attention_bias), position=c.rope(c.head_dim, "interleaved"))
