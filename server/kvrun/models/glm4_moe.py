"""GLM 4.5 and 4.6: GLM's attention with the mixtures of DeepSeek V3."""

from dataclasses import replace

from kvrun.models.deepseek import feed, sigmoid, without_predictors
from kvrun.models.llama import attention
from kvrun.models.mixtral import decoder
from kvrun.spec import Attention, Config, HeadNorm, Model, RmsNorm, architecture

UNSTATED = {"partial_rotary_factor": 0.5, "attention_bias": False, "rms_norm_eps": 1e-5}


@architecture("Glm4MoeForCausalLM")
def glm4_moe(c: Config) -> Model:
    """GLM 4.5 of any size, Air among them."""
    c = c.otherwise(**UNSTATED)
    router = sigmoid(c)
    return without_predictors(decoder(c, lambda i: attend(c), lambda i: feed(c, i, router)), c)


def attend(c: Config) -> Attention:
    """The attention of any layer; its output has no bias."""
    plain = attention(c, qkv_bias=c.attention_bias)
    if not c.get("use_qk_norm", False):
        return plain
    return replace(plain, norm=HeadNorm(RmsNorm("self_attn.q_norm", c.rms_norm_eps), RmsNorm("self_attn.k_norm", c.rms_norm_eps)))
