"""gpt-oss: attention with sinks over windows in every other layer, and experts with biases, gate and up in alternate columns."""

from dataclasses import replace

from kvrun.models.llama import attention
from kvrun.models.mixtral import decoder
from kvrun.spec import Attention, ClampedSwiGlu, Config, Model, Moe, StackedExperts, TopKSoftmax, architecture, linear

EXPERTS = StackedExperts("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "alternating", bias=True, transposed=True)


@architecture("GptOssForCausalLM")
def gpt_oss(c: Config) -> Model:
    """gpt-oss 20B and 120B."""
    act = ClampedSwiGlu(c.get("swiglu_limit", 7.0), c.get("swiglu_alpha", 1.702))
    router, logits = TopKSoftmax(c.num_experts_per_tok), linear("mlp.router", bias=True)
    moe = Moe(c.num_experts, c.intermediate_size, act, router, logits, EXPERTS)
    return decoder(c, lambda i: attend(c, i), lambda i: [moe])


def attend(c: Config, i: int) -> Attention:
    """The attention of layer i."""
    bias, kinds = c.get("attention_bias", True), c.get("layer_types")
    windowed = i % 2 == 0 if kinds is None else kinds[i] == "sliding_attention"
    plain = attention(c, qkv_bias=bias, out_bias=bias, window=c.get("sliding_window", 128) if windowed else None)
    return replace(plain, sinks="self_attn.sinks")
