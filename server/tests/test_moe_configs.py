"""The config files of published mixtures of experts, as written before transformers 5, and what they describe.

Each holds the fields of its file that bear on what is computed.
"""

import math

import kvrun.models  # noqa: F401  (registers every family)
import pytest
from kvrun.spec import (
    Attention,
    ClampedSwiGlu,
    Config,
    Gated,
    GatedMlp,
    GroupedSigmoid,
    GroupedSoftmax,
    LatentAttention,
    LongRopeScaling,
    Mixer,
    SoftmaxTopK,
    SparseMixer,
    TopKSoftmax,
    YarnScaling,
    model_of,
)


def config(name: str, shape: tuple, **fields: object) -> Config:
    """hidden, width, layers, heads, key heads, vocabulary and positions, then what else the file says."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    stated = dict(zip((*keys, "max_position_embeddings"), shape, strict=True))
    return Config({"architectures": [name], "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", **stated, **fields})


def parts(c: Config, layer: int) -> tuple[Mixer, list[Mixer]]:
    """The attention of a layer, and its feed-forward parts."""
    attention, feed = model_of(c).decoder.layers[layer].steps
    return attention.mixers[0], list(feed.mixers)


def test_mixtral_8x7b():
    c = config("MixtralForCausalLM", (4096, 14336, 32, 32, 8, 32000, 32768), rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2)
    attention, (moe,) = parts(c, 0)
    assert (attention.head_dim, attention.window, attention.position.theta) == (128, None, 1e6)
    assert (moe.experts, moe.width, moe.router) == (8, 14336, TopKSoftmax(2))


QWEN = {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}


def test_qwen_moe_of_three_ages():
    c = config("Qwen2MoeForCausalLM", (2048, 5632, 24, 16, 16, 151936, 8192), **QWEN, norm_topk_prob=False, use_sliding_window=False)
    attention, (moe, shared) = parts(c, 5)
    assert attention.qkv.bias and not attention.out.bias
    assert (moe.width, moe.router, type(shared), shared.part.width) == (1408, SoftmaxTopK(4), Gated, 5632)
    stated = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128, "mlp_only_layers": [3]}
    newer = config("Qwen3MoeForCausalLM", (2048, 6144, 48, 32, 4, 151936, 40960), **stated, norm_topk_prob=True, decoder_sparse_step=1)
    assert parts(newer, 0)[1][0].router == TopKSoftmax(8) and isinstance(parts(newer, 3)[1][0], GatedMlp)
    olmoe = config("OlmoeForCausalLM", (2048, 1024, 16, 16, 16, 50304, 4096), num_experts=64, num_experts_per_tok=8, clip_qkv=None)
    assert parts(olmoe, 0)[1][0].router == SoftmaxTopK(8)


def test_dbrx_normalises_expert_weights_unless_its_config_says_not_to():
    feed = {"ffn_hidden_size": 10752, "moe_jitter_eps": 0.01, "moe_num_experts": 16, "moe_top_k": 4}
    stated = {"d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352}
    attend = {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000}
    fields = {"architectures": ["DbrxForCausalLM"], **stated, "attn_config": attend, "ffn_config": feed}
    attention, (moe,) = parts(Config(fields), 0)
    assert (attention.kv_heads, attention.clip, attention.position.theta, moe.router) == (8, 8, 500000, TopKSoftmax(4))
    _, (moe,) = parts(Config({**fields, "ffn_config": {**feed, "moe_normalize_expert_weights": None}}), 0)
    assert moe.router == SoftmaxTopK(4)


def test_gpt_oss_20b():
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    stated = {"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0}
    rope = {"rope_theta": 150000, "rope_scaling": {**yarn, "rope_type": "yarn"}}
    c = config("GptOssForCausalLM", (2880, 2880, 24, 64, 8, 201088, 131072), attention_bias=True, **stated, **rope)
    windowed, (moe,) = parts(c, 0)
    assert isinstance(windowed, Attention) and windowed.sinks is not None and windowed.out.bias
    assert (windowed.window, parts(c, 1)[0].window) == (128, None)
    assert windowed.position.scaling == YarnScaling(32.0, 4096, 0.1 * math.log(32) + 1, truncate=False)
    assert (moe.act, moe.router, moe.logits.bias) == (ClampedSwiGlu(7.0, 1.702), TopKSoftmax(4), True)


YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def test_deepseek_v3():
    stated = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 2048}
    stated |= {"q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    scaling = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    shape = (7168, 18432, 61, 128, 128, 129280, 163840)
    c = config("DeepseekV3ForCausalLM", shape, **LATENT, **stated, rope_scaling=scaling, num_nextn_predict_layers=1)
    attention, feed = parts(c, 3)
    assert isinstance(attention, LatentAttention) and isinstance(parts(c, 2)[1][0], GatedMlp)
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert attention.position.scaling.attention_factor == 1.0
    assert feed[0].router == GroupedSigmoid(8, 8, 4, 2.5, "mlp.gate.e_score_correction_bias") and feed[1].width == 2048
    assert r"\blayers\.61\." in model_of(c).leftovers


def test_deepseek_v2_and_its_lite_version():
    stated = {"moe_intermediate_size": 1408, "n_shared_experts": 2, "first_k_dense_replace": 1, "num_experts_per_tok": 6}
    scaling = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
    lite = {"q_lora_rank": None, "n_routed_experts": 64, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    shape = (2048, 10944, 27, 16, 16, 102400, 163840)
    attention, feed = parts(config("DeepseekV2ForCausalLM", shape, **LATENT, **stated, **lite, rope_scaling=scaling), 1)
    assert attention.query.names == ("self_attn.q_proj",) and feed[0].router == SoftmaxTopK(6) and feed[1].width == 2816
    full = {"q_lora_rank": 1536, "n_routed_experts": 160, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"}
    c = config("DeepseekV2ForCausalLM", shape, **LATENT, **stated, **full, rope_scaling=scaling, routed_scaling_factor=16.0)
    assert parts(c, 1)[0].query.rank == 1536 and parts(c, 1)[1][0].router == GroupedSoftmax(6, 8, 3, 16.0)


def test_glm_4_5_air():
    stated = {"n_routed_experts": 128, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1408}
    stated |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
    stated |= {"head_dim": 128, "attention_bias": True, "use_qk_norm": False, "partial_rotary_factor": 0.5, "rope_theta": 1000000}
    attention, feed = parts(config("Glm4MoeForCausalLM", (4096, 10944, 46, 96, 8, 151552, 131072), **stated), 1)
    assert (attention.position.dim, attention.norm, attention.qkv.bias, attention.out.bias) == (64, None, True, False)
    assert feed[0].experts == 128 and feed[0].router.groups == 1


def test_phi_3_5_moe_under_both_of_its_names():
    scaling = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.5] * 64, "short_mscale": 1.243, "long_mscale": 1.243}
    scaling["original_max_position_embeddings"] = 4096
    stated = {"num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True, "rope_scaling": scaling}
    shape = (4096, 6400, 32, 32, 8, 32064, 131072)
    first = config("PhiMoEForCausalLM", shape, **stated, router_jitter_noise=0.01, original_max_position_embeddings=4096)
    attention, (moe,) = parts(first, 0)
    assert moe.router == SparseMixer(0.01) and model_of(first).decoder.head.bias
    assert isinstance(attention.position.scaling, LongRopeScaling) and attention.position.scaling.long_attention == 1.243
    assert model_of(first) == model_of(Config({**first.fields, "architectures": ["PhimoeForCausalLM"]}))
