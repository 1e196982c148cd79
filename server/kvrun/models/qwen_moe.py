"""Qwen 1.5, 2 and 3 with mixtures of experts, and OLMoE: each the shape of its dense sibling."""

from collections.abc import Callable
from dataclasses import replace

from kvrun.models import mixtral, olmo2, qwen2, qwen3
from kvrun.models.llama import attention, feed_forward
from kvrun.spec import (
    Config,
    EachExpert,
    Gated,
    GatedMlp,
    Mixer,
    Model,
    Moe,
    Router,
    SoftmaxTopK,
    TopKSoftmax,
    architecture,
    fuse,
    linear,
)

AT = "mlp.experts.{e}"
EXPERTS = EachExpert(f"{AT}.gate_proj", f"{AT}.up_proj", f"{AT}.down_proj", together="mlp.experts")


@architecture("Qwen2MoeForCausalLM")
def qwen2_moe(c: Config) -> Model:
    """Qwen 1.5 MoE and Qwen 2 57B: beside the experts a part that every token takes, behind a gate."""
    shared = Gated(linear("mlp.shared_expert_gate"), gated(c, "mlp.shared_expert", c.shared_expert_intermediate_size))
    feed = sparse(c, lambda: [experts(c, softmax(c), c.moe_intermediate_size), shared])
    bias = c.get("qkv_bias", True)
    return mixtral.decoder(c, lambda i: attention(c, qkv_bias=bias, window=qwen2.window(c, i)), feed)


@architecture("Qwen3MoeForCausalLM")
def qwen3_moe(c: Config) -> Model:
    """Qwen 3 30B and 235B."""
    return mixtral.decoder(c, lambda i: qwen3.attend(c, i), sparse(c, lambda: [experts(c, softmax(c), c.moe_intermediate_size)]))


@architecture("OlmoeForCausalLM")
def olmoe(c: Config) -> Model:
    """OLMoE: OLMo 2's attention, Llama's norms."""
    attend = replace(olmo2.attend(c), clip=c.get("clip_qkv"))
    return mixtral.decoder(c, lambda i: attend, lambda i: [experts(c, softmax(c), c.intermediate_size)])


def experts(c: Config, router: Router, width: int) -> Moe:
    """Experts under Qwen's names, which many families share."""
    return Moe(c.num_experts, width, c.hidden_act, router, linear("mlp.gate"), EXPERTS)


def gated(c: Config, at: str, width: int) -> GatedMlp:
    """A feed-forward part of this width under `at`."""
    return GatedMlp(width, c.hidden_act, fuse(f"{at}.gate_proj", f"{at}.up_proj"), linear(f"{at}.down_proj"))


def softmax(c: Config) -> Router:
    """The router that the config's `norm_topk_prob` asks for."""
    top = c.num_experts_per_tok
    return TopKSoftmax(top) if c.get("norm_topk_prob", False) else SoftmaxTopK(top)


def sparse(c: Config, parts: Callable[[], list[Mixer]]) -> Callable[[int], list[Mixer]]:
    """Which layers have the parts of a mixture, and which one feed-forward part."""
    dense, step = c.get("mlp_only_layers", []), c.get("decoder_sparse_step", 1)
    return lambda i: [feed_forward(c)] if i in dense or (i + 1) % step else parts()
