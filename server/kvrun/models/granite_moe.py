"""Granite with mixtures of experts: Granite's multipliers, and all experts in two tensors."""

from collections.abc import Sequence
from dataclasses import replace

from kvrun.models.llama import attention, language_model
from kvrun.spec import Config, Head, Model, Moe, Residual, RmsNorm, StackedExperts, Step, TopKSoftmax, architecture, linear

AT = "block_sparse_moe"
EXPERTS = StackedExperts(f"{AT}.input_linear.weight", f"{AT}.output_linear.weight", together=f"{AT}.experts")


@architecture("GraniteMoeForCausalLM")
def granite_moe(c: Config) -> Model:
    """Granite 3 MoE of any size."""
    bias, eps, scale = c.get("attention_bias", False), c.rms_norm_eps, c.get("residual_multiplier", 1.0)
    attend = replace(attention(c, qkv_bias=bias, out_bias=bias), scale=c.get("attention_multiplier", 1.0))
    router, logits = TopKSoftmax(c.num_experts_per_tok), linear(f"{AT}.router.layer")
    moe = Moe(c.num_experts, c.intermediate_size, c.hidden_act, router, logits, EXPERTS, f"{AT}.router")

    def layer(i: int) -> Sequence[Step]:
        return [
            Residual(RmsNorm("input_layernorm", eps), attend, scale=scale),
            Residual(RmsNorm("post_attention_layernorm", eps), moe, scale=scale),
        ]

    tied, divisor = c.get("tie_word_embeddings", False), c.get("logits_scaling", 1.0)
    head = Head(RmsNorm("model.norm", eps), "lm_head", tied=tied, scale=1 / divisor)
    return language_model(c, layer, head, embedding_scale=c.get("embedding_multiplier", 1.0))
