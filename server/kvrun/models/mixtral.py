"""Mixtral: Mistral's shape with a mixture of experts in place of its feed-forward part."""

from collections.abc import Callable, Sequence

from kvrun.models.llama import attention, language_model
from kvrun.spec import Attention, Config, EachExpert, Mixer, Model, Moe, Residual, RmsNorm, Router, TopKSoftmax, architecture, linear


@architecture("MixtralForCausalLM")
def mixtral(c: Config) -> Model:
    """Mixtral 8x7B and 8x22B."""
    moe = block_sparse(c, TopKSoftmax(c.num_experts_per_tok), "mlp.gate")
    return decoder(c, lambda i: attention(c, window=c.get("sliding_window")), lambda i: [moe])


def block_sparse(c: Config, router: Router, alias: str) -> Moe:
    """Experts under Mixtral's names; `alias` is what newer adapters call the matrix of the router."""
    gate, up, down = (f"block_sparse_moe.experts.{{e}}.{name}" for name in ("w1", "w3", "w2"))
    experts = EachExpert(gate, up, down, together="mlp.experts")
    return Moe(c.num_local_experts, c.intermediate_size, c.hidden_act, router, linear("block_sparse_moe.gate"), experts, alias)


def decoder(c: Config, attend: Callable[[int], Attention], feed: Callable[[int], Sequence[Mixer]]) -> Model:
    """Llama's stack, in which layer i adds the sum of the feed-forward parts `feed(i)`."""

    def layer(i: int) -> Sequence[Residual]:
        return [
            Residual(RmsNorm("input_layernorm", c.rms_norm_eps), attend(i)),
            Residual(RmsNorm("post_attention_layernorm", c.rms_norm_eps), *feed(i)),
        ]

    return language_model(c, layer)
