"""Llama, Mistral, Mixtral, Granite and SmolLM 3: query and key rows lie in pairs that rotate together."""

from kvrun.gguf.architecture import RMS, Architecture, Config, Order, has, register
from kvrun.gguf.container import Container

AT = "model.layers.{n}"
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
FEED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{i}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{i}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{i}.w2",
}
LAYERS = {**NORMS, **ATTENTION, **FEED}
MOE = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
PAIRS: dict[str, Order] = {"attn_q": "pairs", "attn_k": "pairs"}


def biases(container: Container, config: Config) -> Config:
    """Which linears have one."""
    return {"attention_bias": has(container, "attn_q.bias"), "mlp_bias": has(container, "ffn_up.bias")}


def llama(container: Container, config: Config) -> Config:
    """Llama, or Mixtral where there are experts."""
    found = biases(container, config)
    return {**found, "architectures": ["MixtralForCausalLM"]} if config.get("num_local_experts") else found


register(
    Architecture(
        "llama",
        "LlamaForCausalLM",
        ENDS,
        AT,
        {**LAYERS, **EXPERTS},
        {**RMS, **MOE},
        {"hidden_act": "silu"},
        llama,
        orders=PAIRS,
    ),
    Architecture(
        "granite",
        "GraniteForCausalLM",
        ENDS,
        AT,
        LAYERS,
        {
            **RMS,
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        {"hidden_act": "silu"},
        biases,
        orders=PAIRS,
    ),
    Architecture("smollm3", "SmolLM3ForCausalLM", ENDS, AT, LAYERS, RMS, {"hidden_act": "silu"}, biases, orders=PAIRS),
)
