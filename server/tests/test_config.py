"""Reading config.json: both spellings of everything, and messages that name the file and the field."""

import json
from dataclasses import replace

import pytest
from kvrun import models
from kvrun.errors import ConfigError, FilesError, Unsupported
from kvrun.spec import Config, DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling, model_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


@pytest.mark.parametrize(
    ("key", "alias"),
    [
        ("hidden_size", "n_embd"),
        ("hidden_size", "d_model"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("num_key_value_heads", "n_head_kv"),
        ("num_key_value_heads", "num_kv_heads"),
        ("layer_norm_eps", "layer_norm_epsilon"),
        ("max_position_embeddings", "n_positions"),
        ("dtype", "torch_dtype"),
    ],
)
def test_a_field_is_found_under_its_other_names(key, alias):
    assert Config({alias: 7}).get(key) == 7
    assert getattr(Config({alias: 7}), key) == 7
    assert Config({key: 7, alias: 8}).get(key) == 7


@pytest.mark.parametrize("field", sorted(set(LLAMA) - {"architectures"}))
@pytest.mark.parametrize("null", [True, False])
def test_a_missing_field_is_named_with_its_file_and_what_was_found(field, null, tmp_path):
    fields = {**LLAMA, field: None} if null else {k: v for k, v in LLAMA.items() if k != field}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError) as error:
        models.read(tmp_path)
    assert field in str(error.value) and "rms_norm_eps" in str(error.value) and str(tmp_path / "config.json") in str(error.value)
    assert error.value.exit_code == 10


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", [3]])
def test_architectures_must_name_a_class(names):
    with pytest.raises(ConfigError, match="architectures"):
        model_of(Config({**LLAMA, "architectures": names}))


def test_an_unknown_architecture_is_answered_with_the_nearest_served_ones():
    with pytest.raises(Unsupported, match=r"LlamaForSequence.* is not served; the nearest served ones are LlamaForCausalLM"):
        model_of(Config({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(Unsupported, match=r"served are .*GPT2LMHeadModel"):
        model_of(Config({**LLAMA, "architectures": ["Zzz"]}))


@pytest.mark.parametrize(("field", "value"), [("hidden_size", "64"), ("num_attention_heads", 0), ("num_hidden_layers", "two")])
def test_a_field_of_the_wrong_kind_is_a_config_error(field, value):
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        model_of(Config({**LLAMA, field: value}))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_a_config_that_is_no_json_object_is_a_file_error(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(FilesError, match=r"config\.json"):
        Config.read(tmp_path)


def test_a_folder_without_config_says_what_a_model_folder_holds(tmp_path):
    with pytest.raises(FilesError, match=r"config\.json is missing.*safetensors") as error:
        Config.read(tmp_path)
    assert error.value.exit_code == 11


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHORT_FACTOR, LONG_FACTOR = [1.0] * 4 + [1.5] * 4, [2.0] * 4 + [3.0] * 4
LONG = {"short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR, "original_max_position_embeddings": 128}
STRETCHED = 1.1338934190276817  # sqrt(1 + log(512 / 128) / log(128))
SCALINGS = {
    "linear": ({"factor": 2.0}, LinearScaling(2.0)),
    "dynamic": ({"factor": 2.0}, DynamicScaling(2.0)),
    "llama3": (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 64)),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 128}, YarnScaling(4.0, 128, 1.1386294361119891)),
    "longrope": (LONG, LongRopeScaling(tuple(SHORT_FACTOR), tuple(LONG_FACTOR), 128, STRETCHED, STRETCHED)),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_scaling_reads_the_same_in_both_spellings(kind):
    numbers, scaling = SCALINGS[kind]
    wanted = Rope(16, 5e5, scaling)
    assert Config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": kind, **numbers}}).rope(16) == wanted
    assert Config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **numbers}}).rope(16) == wanted
    assert Config({**LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **numbers}}).rope(16) == wanted


def test_rope_without_parameters_is_plain():
    assert Config(LLAMA).rope(16) == Rope(16, 10_000.0)
    assert Config({**LLAMA, "rope_scaling": None}).rope(16) == Rope(16, 10_000.0)
    assert Config({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}).rope(16) == Rope(16, 1e6)


def test_rope_reads_partial_rotation_and_the_older_names():
    assert Config({**LLAMA, "partial_rotary_factor": 0.5}).rope(16).dim == 8
    assert Config({**LLAMA, "rotary_pct": 0.25, "rotary_emb_base": 5}).rope(16) == Rope(4, 5.0)
    su = {"type": "su", **LONG}
    assert Config({**LLAMA, "rope_scaling": su}).rope(16).scaling == SCALINGS["longrope"][1]


def test_the_original_positions_may_stand_outside_the_scaling_and_default_to_the_positions():
    outside = {**LLAMA, "original_max_position_embeddings": 32, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert Config(outside).rope(16).scaling.original_positions == 32
    assert Config({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}).rope(16).scaling.original_positions == 512


def test_yarn_takes_its_attention_factor_from_where_it_is_stated():
    def attention(**fields):
        return Config({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0, **fields}}).rope(16).scaling.attention_factor

    assert attention(attention_factor=1.5) == 1.5
    assert attention(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert attention() == pytest.approx(1.1386, abs=1e-4)


def test_longrope_takes_a_factor_for_each_table_where_they_are_stated():
    scaling = Config({**LLAMA, "rope_scaling": {"type": "longrope", **LONG, "short_mscale": 1.1, "long_mscale": 1.2}}).rope(16).scaling
    assert (scaling.short_attention, scaling.long_attention) == (1.1, 1.2)


def test_a_scaling_without_its_numbers_or_of_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="longrope needs 4 numbers in short_factor and in long_factor; found 8 and 8"):
        Config({**LLAMA, "rope_scaling": {"type": "longrope", **LONG}}).rope(8)
    with pytest.raises(ConfigError, match="llama3 needs the field high_freq_factor; found factor, low_freq_factor"):
        Config({**LLAMA, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}).rope(16)
    with pytest.raises(Unsupported, match="rope scaling spiral is not served; known are default, linear"):
        Config({**LLAMA, "rope_scaling": {"type": "spiral"}}).rope(16)


@pytest.mark.parametrize(("ours", "theirs", "ids"), [(2, None, (2,)), ([2, 5], 7, (2, 5, 7)), (None, [9, 2], (2, 9)), (None, None, ())])
def test_end_tokens_are_those_of_both_files(ours, theirs, ids, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": ours}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": theirs}))
    assert Config.read(tmp_path).end_tokens == ids


FALCON = {
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "vocab_size": 259,
    "layer_norm_epsilon": 1e-5,
    "new_decoder_architecture": True,
    "bias": False,
    "parallel_attn": True,
    "multi_query": True,
    "alibi": False,
}


def test_the_first_falcon_files_describe_the_same_model():
    renamed = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_kv_heads": "n_head_kv"}
    old = {renamed.get(k, k): v for k, v in FALCON.items() if k != "new_decoder_architecture"}
    old |= {"architectures": ["RWForCausalLM"], "model_type": "RefinedWeb"}
    assert model_of(Config(old)) == model_of(Config(FALCON))
    small = model_of(Config({**old, "model_type": "RefinedWebModel"})).decoder.layers[0].steps[0]
    assert small.mixers[0].kv_heads == 1


MPT = {
    "architectures": ["MPTForCausalLM"],
    "d_model": 64,
    "n_layers": 1,
    "n_heads": 4,
    "max_seq_len": 8,
    "vocab_size": 259,
    "no_bias": True,
}


def test_the_first_mpt_files_describe_the_same_model_and_other_attention_is_refused():
    alibi = {"alibi": True, "alibi_bias_max": 8, "qk_ln": False, "clip_qkv": None}
    assert model_of(Config({**MPT, "attn_config": alibi})) == model_of(
        Config({**MPT, "architectures": ["MptForCausalLM"], "attn_config": {"alibi": True}})
    )
    with pytest.raises(Unsupported, match="attn_config: qk_ln True is not served; known are False"):
        model_of(Config({**MPT, "attn_config": {**alibi, "qk_ln": True}}))
    with pytest.raises(Unsupported, match="logit_scale"):
        model_of(Config({**MPT, "attn_config": alibi, "logit_scale": "inv_sqrt_d_model"}))


def test_gpt2_reads_its_width_or_takes_four_times_the_hidden_size():
    fields = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 8, "vocab_size": 259}
    fields["layer_norm_epsilon"] = 1e-5
    stated = model_of(Config({**fields, "n_inner": 80}))
    derived = model_of(Config({**fields, "n_inner": None}))
    assert stated.decoder.layers[0].steps[1].mixers[0].width == 80
    assert derived.decoder.layers[0].steps[1].mixers[0] == replace(stated.decoder.layers[0].steps[1].mixers[0], width=256)
