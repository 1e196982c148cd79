"""GPT-2, BLOOM, MPT, GPT-NeoX and Falcon: queries, keys and values in one matrix."""

from kvrun.gguf.architecture import LAYER, Architecture, Config, has, register
from kvrun.gguf.container import Container

FALCON = {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
BLOOM = {**FALCON, "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
WORDS = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}


def falcon(container: Container, config: Config) -> Config:
    """The layout of newer models is told by a second norm, or by more than one key/value head."""
    two = has(container, "attn_norm_2.weight")
    return {
        "new_decoder_architecture": two or config.get("num_key_value_heads", 1) > 1,
        "num_ln_in_parallel_attn": 2 if two else 1,
        "bias": has(container, "attn_qkv.bias"),
    }


def mpt(container: Container, config: Config) -> Config:
    """What MPT's config keeps in a mapping of its own."""
    steepest = container.field("{arch}.attention.max_alibi_bias", 8.0)
    clip = container.metadata.get("mpt.attention.clamp_kqv")
    return {
        "attn_config": {
            "alibi": steepest > 0,
            "alibi_bias_max": int(steepest),
            "clip_qkv": clip,
            "qk_ln": has(container, "attn_q_norm.weight"),
        },
        "expansion_ratio": config["intermediate_size"] / config["hidden_size"],
    }


register(
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head"},
        "transformer.h.{n}",
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        LAYER,
        {"hidden_act": "gelu_new"},
    ),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        {**WORDS, "token_embd_norm": "transformer.word_embeddings_layernorm"},
        "transformer.h.{n}",
        BLOOM,
        {**LAYER, "seq_length": "context_length"},
        orders={"attn_qkv": "parts"},
    ),
    Architecture(
        "mpt",
        "MptForCausalLM",
        {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
        "transformer.blocks.{n}",
        {
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        LAYER,
        derive=mpt,
    ),
    Architecture(
        "gptneox",
        "GPTNeoXForCausalLM",
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        "gpt_neox.layers.{n}",
        {**BLOOM, "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"},
        {**LAYER, "use_parallel_residual": "use_parallel_residual"},
        {"hidden_act": "gelu"},
        lambda container, config: {"attention_bias": has(container, "attn_qkv.bias")},
        orders={"attn_qkv": "parts"},
    ),
    Architecture(
        "falcon",
        "FalconForCausalLM",
        WORDS,
        "transformer.h.{n}",
        {**FALCON, "attn_norm": "input_layernorm"},
        LAYER,
        {"multi_query": True, "parallel_attn": True, "alibi": False},
        falcon,
        orders={"attn_qkv": "parts"},
        variant=("attn_norm_2", {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}),
    ),
)
