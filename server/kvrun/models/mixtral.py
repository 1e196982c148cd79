"""Mixtral: Mistral's shape with a mixture of experts in place of its feed-forward part."""

from kvrun.models.llama import attention, decoder
from kvrun.spec import Config, EachExpert, Model, Moe, TopKSoftmax, architecture, linear

AT = "block_sparse_moe"
EXPERTS = EachExpert(f"{AT}.experts.{{e}}.w1", f"{AT}.experts.{{e}}.w3", f"{AT}.experts.{{e}}.w2", together="mlp.experts")


@architecture("MixtralForCausalLM")
def mixtral(c: Config) -> Model:
    """Mixtral 8x7B and 8x22B."""
    moe = Moe(
        c.num_local_experts,
        c.intermediate_size,
        act=c.hidden_act,
        router=TopKSoftmax(c.num_experts_per_tok),
        logits=linear(f"{AT}.gate"),
        layout=EXPERTS,
        logits_alias="mlp.gate",
    )
    return decoder(c, lambda i: attention(c, window=c.get("sliding_window")), lambda i: moe)
