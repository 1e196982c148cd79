"""DeepSeek V2, V3 and R1: latent attention, and experts in groups beside a part that every token takes."""

from dataclasses import replace

from kvrun.models.latent import attend
from kvrun.models.llama import feed_forward, language_model
from kvrun.models.qwen_moe import experts, gated
from kvrun.spec import (
    Config,
    GroupedSigmoid,
    GroupedSoftmax,
    Mixer,
    Model,
    PlainGroupedSigmoid,
    Residual,
    RmsNorm,
    Router,
    SoftmaxTopK,
    Step,
    architecture,
)


@architecture("DeepseekV2ForCausalLM")
def deepseek_v2(c: Config) -> Model:
    """DeepSeek V2, its Lite version among them."""
    top, scale = c.num_experts_per_tok, c.get("routed_scaling_factor", 1.0)
    limited = c.get("topk_method", "greedy") == "group_limited_greedy"
    router = GroupedSoftmax(top, c.n_group, c.topk_group, scale) if limited else SoftmaxTopK(top, scale)
    return decoder(c, router)


@architecture("DeepseekV3ForCausalLM")
def deepseek_v3(c: Config) -> Model:
    """DeepSeek V3 and R1."""
    return decoder(c, sigmoid(c))


def sigmoid(c: Config) -> Router:
    """The router of V3, which others have taken over."""
    kind = GroupedSigmoid if c.get("norm_topk_prob", True) else PlainGroupedSigmoid
    scale, correction = c.get("routed_scaling_factor", 1.0), "mlp.gate.e_score_correction_bias"
    return kind(c.num_experts_per_tok, c.get("n_group", 1), c.get("topk_group", 1), scale, correction)


def decoder(c: Config, router: Router) -> Model:
    """Latent attention and mixtures in all but the first layers."""

    def layer(i: int) -> list[Step]:
        return [
            Residual(RmsNorm("input_layernorm", c.rms_norm_eps), attend(c)),
            Residual(RmsNorm("post_attention_layernorm", c.rms_norm_eps), *feed(c, i, router)),
        ]

    return without_predictors(language_model(c, layer), c)


def feed(c: Config, i: int, router: Router) -> list[Mixer]:
    """The feed-forward parts of layer i."""
    if i < c.get("first_k_dense_replace", 0):
        return [feed_forward(c)]
    shared = c.get("n_shared_experts", 0) * c.moe_intermediate_size
    mixture = experts(c, router, c.moe_intermediate_size)
    return [mixture, gated(c, "mlp.shared_experts", shared)] if shared else [mixture]


def without_predictors(model: Model, c: Config) -> Model:
    """The model beside whose layers a checkpoint may hold further ones, which guess tokens ahead."""
    further = range(c.num_hidden_layers, c.num_hidden_layers + c.get("num_nextn_predict_layers", 1))
    return replace(model, leftovers=(*model.leftovers, *(rf"\blayers\.{number}\." for number in further)))
