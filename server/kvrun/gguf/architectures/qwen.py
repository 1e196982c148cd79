"""Qwen 2 and 3, with one feed-forward part or a mixture of experts."""

from kvrun.gguf.architecture import RMS, Architecture, Config, has, register
from kvrun.gguf.architectures.llama import AT, ATTENTION, ENDS, FEED, LAYERS, NORMS
from kvrun.gguf.container import Container

HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{i}.gate_proj",
    "ffn_up_exps": "mlp.experts.{i}.up_proj",
    "ffn_down_exps": "mlp.experts.{i}.down_proj",
}
SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
MOE = {
    **RMS,
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
SILU = {"hidden_act": "silu"}


def moe(container: Container, config: Config) -> Config:
    """Widths that older files leave to their tensors, and layers that have one feed-forward part beside those with experts."""
    fields = {"moe_intermediate_size": "ffn_gate_exps", "shared_expert_intermediate_size": "ffn_gate_shexp"}
    found: Config = {"qkv_bias": has(container, "attn_q.bias")}
    dense = []
    for layer in range(config["num_hidden_layers"]):
        if f"blk.{layer}.ffn_gate_exps.weight" not in container.tensors:
            dense.append(layer)
            continue
        for name, tensor in fields.items():
            held = container.tensors.get(f"blk.{layer}.{tensor}.weight")
            if held is not None:
                found[name] = held.shape[-2]
    return {**found, "mlp_only_layers": dense}


register(
    Architecture("qwen2", "Qwen2ForCausalLM", ENDS, AT, LAYERS, RMS, SILU),
    Architecture("qwen3", "Qwen3ForCausalLM", ENDS, AT, {**LAYERS, **HEAD_NORMS}, RMS, SILU),
    Architecture(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        ENDS,
        AT,
        {**NORMS, **ATTENTION, **FEED, **EXPERTS, **SHARED},
        MOE,
        {**SILU, "norm_topk_prob": False},
        moe,
    ),
    Architecture(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        ENDS,
        AT,
        {**NORMS, **ATTENTION, **FEED, **EXPERTS, **HEAD_NORMS},
        MOE,
        {**SILU, "norm_topk_prob": True},
        moe,
    ),
)
