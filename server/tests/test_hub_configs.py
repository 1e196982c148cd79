"""The config files of published models, as written before transformers 5: what they describe, and that the newer spelling says the same.

Each holds the fields of its file that bear on what is computed, and some that do not.
"""

import kvrun.models  # noqa: F401  (registers every family)
import pytest
from kvrun.spec import (
    Attention,
    Config,
    EachHeadNorm,
    HeadNorm,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Model,
    ProjectionNorm,
    Rope,
    YarnScaling,
    model_of,
)

COMMON = {
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "transformers_version": "4.50.0",
}
SILU = {**COMMON, "hidden_act": "silu"}
TANH = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
FACTORS = {"short_factor": [1.0] * 24 + [1.5] * 24, "long_factor": [1.0] * 8 + [40.0] * 40}


def shape(hidden: int, width: int, layers: int, heads: int, kv_heads: int, vocabulary: int, positions: int) -> dict:
    """The sizes that every file states."""
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }


PUBLISHED = {
    "Qwen3-8B": {
        **SILU,
        **shape(4096, 12288, 36, 32, 8, 151936, 40960),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "max_window_layers": 36,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "Phi-3-mini-128k-instruct": {
        **SILU,
        **shape(3072, 8192, 32, 32, 32, 32064, 131072),
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {**FACTORS, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
    },
    "Phi-4-mini-instruct": {
        **SILU,
        **shape(3072, 8192, 32, 24, 8, 200064, 131072),
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {**FACTORS, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "phi-4": {
        **SILU,
        **shape(5120, 17920, 40, 40, 10, 100352, 16384),
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "phi-2": {
        **COMMON,
        **shape(2560, 10240, 32, 32, 32, 51200, 2048),
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "gemma-2b-it": {
        **COMMON,
        **shape(2048, 16384, 18, 8, 1, 256000, 8192),
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "head_dim": 256,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "gemma-2-27b-it": {
        **COMMON,
        **TANH,
        **shape(4608, 36864, 46, 32, 16, 256000, 8192),
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "gemma-3-1b-it": {
        **COMMON,
        **shape(1152, 6912, 26, 4, 1, 262144, 32768),
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma-3-4b-it, its text_config alone": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "c4ai-command-r-v01": {
        **SILU,
        **shape(8192, 22528, 40, 64, 64, 256000, 8192),
        "architectures": ["CohereForCausalLM"],
        "model_type": "cohere",
        "attention_bias": False,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "model_max_length": 131072,
        "rope_theta": 8000000.0,
    },
    "c4ai-command-r-plus": {
        **SILU,
        **shape(12288, 33792, 64, 96, 8, 256000, 8192),
        "architectures": ["CohereForCausalLM"],
        "model_type": "cohere",
        "attention_bias": False,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.8333333333333334,
        "model_max_length": 131072,
        "rope_theta": 75000000.0,
        "use_qk_norm": True,
    },
    "c4ai-command-r7b-12-2024": {
        **SILU,
        **shape(4096, 14336, 32, 32, 8, 256000, 8192),
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "attention_bias": False,
        "head_dim": 128,
        "layer_norm_eps": 1e-5,
        "layer_switch": 4,
        "logit_scale": 0.25,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rope_scaling": None,
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "OLMo-2-1124-7B": {
        **SILU,
        **shape(4096, 11008, 32, 32, 32, 100352, 4096),
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "Olmo-3-7B": {
        **SILU,
        **shape(4096, 11008, 32, 32, 32, 100278, 65536),
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "attention_bias": False,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    "GLM-4-9B-0414": {
        **SILU,
        **shape(4096, 13696, 40, 32, 2, 151552, 32768),
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "granite-3.1-2b-instruct": {
        **SILU,
        **shape(2048, 8192, 40, 32, 8, 49155, 131072),
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "mlp_bias": False,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
    },
    "SmolLM3-3B": {
        **SILU,
        **shape(2048, 11008, 36, 16, 4, 128256, 65536),
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "attention_bias": False,
        "layer_types": ["full_attention"] * 36,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "starcoder2-3b": {
        **COMMON,
        **shape(3072, 12288, 30, 24, 2, 49152, 16384),
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "hidden_act": "gelu_pytorch_tanh",
        "mlp_type": "default",
        "norm_epsilon": 1e-5,
        "norm_type": "layer_norm",
        "rope_theta": 999999.4420358813,
        "sliding_window": 4096,
        "use_bias": True,
    },
    "stablelm-2-12b": {
        **SILU,
        **shape(5120, 13824, 40, 32, 8, 100352, 4096),
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": True,
        "rope_scaling": None,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "use_qkv_bias": False,
    },
    "EXAONE-4.0-32B": {
        **SILU,
        **shape(5120, 27392, 64, 40, 8, 102400, 131072),
        "architectures": ["Exaone4ForCausalLM"],
        "model_type": "exaone4",
        "head_dim": 128,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "sliding_window_pattern": "LLLG",
        "tie_word_embeddings": False,
    },
}


def published(name: str) -> Model:
    return model_of(Config(PUBLISHED[name]))


def attentions(name: str) -> list[Attention]:
    """The attention of every layer."""
    layers = published(name).decoder.layers
    return [mixer for layer in layers for step in layer.steps for mixer in step.mixers if isinstance(mixer, Attention)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_file_that_transformers_would_write_of_it_today_describes_the_same_model(name):
    from transformers import CONFIG_MAPPING

    fields = PUBLISHED[name]
    newer = CONFIG_MAPPING[fields["model_type"]](**fields).to_dict()
    assert "rope_parameters" in newer and "rope_theta" not in newer and "torch_dtype" not in newer
    assert model_of(Config(newer)) == published(name)


def test_every_published_shape_has_its_positions_and_its_dtype():
    assert {name for name in PUBLISHED if Config(PUBLISHED[name]).get("dtype") is None} == {"gemma-3-4b-it, its text_config alone"}
    assert published("gemma-3-4b-it, its text_config alone").positions == 131072
    assert published("gemma-3-1b-it").positions == 32768
    assert published("c4ai-command-r-v01").positions == 131072  # the file's other count, 8192, is for training


def test_gemma_3_has_two_bases_and_stretches_only_the_layers_that_see_everything():
    layers = attentions("gemma-3-4b-it, its text_config alone")
    assert [i for i, layer in enumerate(layers) if layer.window is None] == [5, 11, 17, 23, 29]
    assert {layer.position for layer in layers if layer.window == 1024} == {Rope(256, 1e4)}
    assert {layer.position for layer in layers if layer.window is None} == {Rope(256, 1e6, LinearScaling(8.0))}
    assert (layers[0].heads, layers[0].kv_heads, layers[0].scale) == (8, 4, 0.0625)
    assert all(isinstance(layer.norm, HeadNorm) and layer.norm.query.offset == 1 for layer in layers)
    assert {layer.position.theta for layer in attentions("gemma-3-1b-it")} == {1e4, 1e6}


def test_gemma_2_alternates_and_scales_by_a_number_of_its_own():
    layers = attentions("gemma-2-27b-it")
    assert [layer.window for layer in layers] == [4096, None] * 23
    assert {(layer.scale, layer.softcap) for layer in layers} == {(144**-0.5, 50.0)}
    head = published("gemma-2-27b-it").decoder.head
    assert (head.softcap, head.tied, head.norm.offset) == (30.0, True, 1.0)


def test_gemma_says_gelu_and_means_its_tanh_form():
    model = published("gemma-2b-it")
    assert model.decoder.layers[0].steps[1].mixers[0].act == "gelu_pytorch_tanh"
    assert model.decoder.embed.scale == 2048**0.5 and model.decoder.head.tied


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_phi_3_states_its_original_positions_outside_of_its_scaling(kind):
    fields = PUBLISHED["Phi-3-mini-128k-instruct"]
    fields = {**fields, "rope_scaling": {**fields["rope_scaling"], "type": kind}}
    scaling = model_of(Config(fields)).decoder.layers[0].steps[0].mixers[0].position.scaling
    short, long = tuple(FACTORS["short_factor"]), tuple(FACTORS["long_factor"])
    assert scaling == LongRopeScaling(short, long, 4096, *[pytest.approx(1.1902380714238083)] * 2)


def test_phi_rotates_part_of_each_head():
    assert attentions("Phi-4-mini-instruct")[0].position.dim == 96
    assert attentions("phi-2")[0].position == Rope(32, 1e4)
    assert attentions("phi-4")[0].position == Rope(128, 250_000.0)


def test_cohere_scales_its_logits_and_knows_three_kinds_of_layer():
    head = published("c4ai-command-r-v01").decoder.head
    assert (head.scale, head.tied, head.norm.bias) == (0.0625, True, False)
    plus, small = attentions("c4ai-command-r-plus"), attentions("c4ai-command-r7b-12-2024")
    assert attentions("c4ai-command-r-v01")[0].norm is None and isinstance(plus[0].norm, EachHeadNorm)
    assert plus[0].position == Rope(128, 75e6, style="interleaved")
    assert [layer.window for layer in small] == [4096, 4096, 4096, None] * 8
    assert [layer.position is None for layer in small] == [False, False, False, True] * 8


def test_olmo_normalises_whole_projections_and_after_each_part():
    steps = published("OLMo-2-1124-7B").decoder.layers[0].steps
    assert all(step.norm is None and step.after is not None for step in steps)
    assert isinstance(steps[0].mixers[0].norm, ProjectionNorm)
    layers = attentions("Olmo-3-7B")
    assert layers[0].position == Rope(128, 5e5) and isinstance(layers[3].position.scaling, YarnScaling)


def test_glm_puts_biases_on_its_inputs_only_and_rotates_half_of_each_head():
    attention = attentions("GLM-4-9B-0414")[0]
    assert attention.position == Rope(64, 1e4, style="interleaved")
    assert attention.qkv.bias and not attention.out.bias
    assert Config(PUBLISHED["GLM-4-9B-0414"]).end_tokens == (151329, 151336, 151338)


def test_granite_multiplies():
    model = published("granite-3.1-2b-instruct")
    steps, head = model.decoder.layers[0].steps, model.decoder.head
    assert (model.decoder.embed.scale, steps[0].mixers[0].scale, head.scale) == (12.0, 0.015625, 0.125)
    assert {step.scale for step in steps} == {0.22}


def test_some_layers_have_no_positions():
    assert [layer.position is None for layer in attentions("SmolLM3-3B")] == [False, False, False, True] * 9
    exaone = attentions("EXAONE-4.0-32B")
    assert [(layer.window, layer.position is None) for layer in exaone[:4]] == [(4096, False)] * 3 + [(None, True)]
    assert isinstance(exaone[0].position.scaling, Llama3Scaling)
    unlisted = {key: value for key, value in PUBLISHED["EXAONE-4.0-32B"].items() if key != "layer_types"}
    assert model_of(Config(unlisted)) == published("EXAONE-4.0-32B")


def test_heads_are_tied_where_the_file_does_not_say():
    unsaid = {name for name, fields in PUBLISHED.items() if "tie_word_embeddings" not in fields}
    assert {name for name in unsaid if not published(name).decoder.head.tied} == set()
