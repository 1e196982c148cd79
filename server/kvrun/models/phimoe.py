"""Phi 3.5 MoE: Mixtral's names and sizes with layer norms, biases, and experts chosen one after the other."""

from kvrun.models.llama import attention, language_model
from kvrun.models.mixtral import block_sparse
from kvrun.spec import Config, Head, LayerNorm, Model, Residual, SparseMixer, architecture


@architecture("PhimoeForCausalLM", "PhiMoEForCausalLM")
def phimoe(c: Config) -> Model:
    """Phi 3.5 MoE."""
    bias, eps = c.get("attention_bias", False), c.rms_norm_eps
    moe = block_sparse(c, SparseMixer(c.get("router_jitter_noise", 0.01)), "mlp.router")
    attend = attention(c, qkv_bias=bias, out_bias=bias, window=c.get("sliding_window"))
    steps = [Residual(LayerNorm("input_layernorm", eps), attend), Residual(LayerNorm("post_attention_layernorm", eps), moe)]
    tied = c.get("tie_word_embeddings", False)
    head = Head(LayerNorm("model.norm", eps), "lm_head", tied=tied, bias=c.get("lm_head_bias", False))
    return language_model(c, lambda i: steps, head)
