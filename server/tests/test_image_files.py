"""Files of models that see: every spelling of names and settings, weight formats, adapters, and what `inspect` says of them."""

import json
import shutil

import pytest
import torch
from adapters import edit_tensors, write_adapter
from kvrun.errors import AdapterError, ConfigError, Unsupported
from kvrun.inspect import inspect_model
from kvrun.lora.adapter import read_adapter
from kvrun.nn.build import load_model
from kvrun.quant import DenseLinear
from kvrun.spec import Config, PanAndScan, describe, model_of
from pictures import picture
from safetensors.torch import load_file, save_file

DATA = picture(40, 23, seed=1)

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32064,
}
CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAVA = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "vision_config": CLIP,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
VICUNA = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05}
SIGLIP = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
# The fields of published files, as far as they say what is computed: name -> config, special tokens, settings of images.
PUBLISHED = {
    "llava-v1.6-mistral-7b": ({**LLAVA, "text_config": MISTRAL}, {"<image>": 32000}, {"size": {"shortest_edge": 336}}),
    "llava-v1.6-vicuna-7b": ({**LLAVA, "text_config": {**VICUNA, "vocab_size": 32064}}, {"<image>": 32000}, {}),
    "idefics2-8b": (
        {
            "architectures": ["Idefics2ForConditionalGeneration"],
            "image_token_id": 32001,
            "model_type": "idefics2",
            "perceiver_config": {"model_type": "idefics2"},
            "text_config": {**MISTRAL, "rope_theta": 10000.0, "vocab_size": 32003},
            "vision_config": {**SIGLIP, "model_type": "idefics2"},
        },
        {"<fake_token_around_image>": 32000, "<image>": 32001},
        {"do_image_splitting": True, "size": {"shortest_edge": 378, "longest_edge": 980}},
    ),
    "idefics-9b": (
        {
            "additional_vocab_size": 2,
            "alpha_type": "float",
            "architectures": ["IdeficsForVisionText2Text"],
            "cross_layer_interval": 4,
            "max_position_embeddings": 2048,
            "model_type": "idefics",
            "perceiver_config": {"model_type": "idefics", "qk_layer_norms_perceiver": True, "resampler_depth": 6},
            "qk_layer_norms": True,
            "rms_norm_eps": 1e-06,
            "use_resampler": True,
            "vision_config": {"embed_dim": 1280, "image_size": 224, "intermediate_size": 5120, "model_type": "idefics"},
            "vocab_size": 32000,
        },
        {"<fake_token_around_image>": 32000, "<image>": 32001},
        {"image_size": 224, "image_mean": [0.48145466, 0.4578275, 0.40821073]},
    ),
    "gemma-3-4b-it": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {**SIGLIP, "image_size": 896, "model_type": "siglip_vision_model", "vision_use_head": False},
        },
        {"\n\n": 108, "<start_of_image>": 255999, "<end_of_image>": 256000, "<image_soft_token>": 262144},
        {"do_pan_and_scan": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 896, "width": 896}},
    ),
}


def folder_of(name: str, at, newer: bool):
    """A folder of a published model without its weights, or as today's transformers would write it anew."""
    from transformers import CONFIG_MAPPING

    config, tokens, images = PUBLISHED[name]
    if newer:
        kind = CONFIG_MAPPING[config["model_type"]]
        config = {**kind.from_dict(json.loads(json.dumps(config))).to_dict(), "architectures": config["architectures"]}
        (at / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    else:
        (at / "preprocessor_config.json").write_text(json.dumps(images))
    (at / "config.json").write_text(json.dumps(config))
    added = [{"content": text, "id": token} for text, token in tokens.items()]
    (at / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": {"a": 5}}}))
    return at


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_mean_what_transformers_takes_them_for(name, tmp_path):
    (older := tmp_path / "older").mkdir()
    (newer := tmp_path / "newer").mkdir()
    found = describe(model_of(Config.read(folder_of(name, older, newer=False))))
    assert found == describe(model_of(Config.read(folder_of(name, newer, newer=True))))


def test_what_a_published_llava_says_of_images(tmp_path):
    images = model_of(Config.read(folder_of("llava-v1.6-mistral-7b", tmp_path, newer=False))).images
    assert (images.marker, images.token, images.cutting.side, images.cutting.tokens) == ("<image>", 32000, 336, 24)
    assert len(images.encoder.layers) == 23 and images.pixels.filter == 3


def test_what_a_published_idefics_says_of_images(tmp_path):
    images = model_of(Config.read(folder_of("idefics2-8b", tmp_path, newer=False))).images
    assert images.text == "<fake_token_around_image><image>" * 5 + "<fake_token_around_image>"
    assert (images.border, images.token, images.features) == ("<fake_token_around_image>", 32001, 64)


def test_what_a_published_first_idefics_says_of_images(tmp_path):
    model = model_of(Config.read(folder_of("idefics-9b", tmp_path, newer=False)))
    assert model.images.text == "<fake_token_around_image><image><fake_token_around_image>"
    assert (model.images.token, model.images.features, model.images.memory) == (32001, 1, 64)
    assert len(model.decoder.layers) == 32 + 8 and model.decoder.embed.vocabulary == 32002


def test_what_a_published_gemma_says_of_images(tmp_path):
    config = Config.read(folder_of("gemma-3-4b-it", tmp_path, newer=False))
    images = model_of(config).images
    assert images.text == "\n\n<start_of_image><image_soft_token><end_of_image>\n\n" and images.together
    assert (images.token, images.features, images.marker) == (262144, 256, "<start_of_image>")
    assert config.end_tokens == (1, 106)


def test_what_a_gemma_says_that_shows_images_in_crops_too(tmp_path):
    folder = folder_of("gemma-3-4b-it", tmp_path, newer=False)
    path = folder / "preprocessor_config.json"
    stated = {"do_pan_and_scan": True, "pan_and_scan_max_num_crops": 3, "pan_and_scan_min_crop_size": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), **stated}))
    cutting = model_of(Config.read(folder)).images.cutting
    assert isinstance(cutting, PanAndScan)
    assert (cutting.side, cutting.shortest, cutting.most, cutting.ratio) == (896, 256, 3, 1.2)


REFUSED = {
    r"vision_feature_layer \[-2, -5\]": ({"vision_feature_layer": [-2, -5]}, {}),
    "vision_feature_select_strategy 'full'": ({"vision_feature_select_strategy": "full"}, {}),
    "image_grid_pinpoints": ({}, {"image_grid_pinpoints": [[336, 336]]}),
    "do_normalize": ({}, {"do_normalize": False}),
    "model_type 'pixtral'": ({"vision_config": {"model_type": "pixtral"}}, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_served_is_refused_by_name(reason, tmp_path):
    folder = folder_of("llava-v1.6-mistral-7b", tmp_path, newer=False)
    for name, fields in zip(("config.json", "preprocessor_config.json"), REFUSED[reason]):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(Unsupported, match=reason):
        model_of(Config.read(folder))


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(missing, tmp_path):
    folder = folder_of("llava-v1.6-mistral-7b", tmp_path, newer=False)
    (folder / missing).unlink()
    with pytest.raises(Exception, match=missing):
        model_of(Config.read(folder))


def test_a_marker_that_is_no_special_token_is_named(tmp_path):
    folder = folder_of("llava-v1.6-mistral-7b", tmp_path, newer=False)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))
    with pytest.raises(ConfigError, match="token 32000, which is no special token"):
        model_of(Config.read(folder))


SPELLINGS = {
    "as first published": {"vision_tower.": "vision_tower.vision_model."},
    "as modules are called today": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head": "lm_head",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
}


def respelled(source, target, moves):
    """A checkpoint with some names beginning otherwise."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")

    def name(old: str) -> str:
        for before, after in moves.items():
            if old.startswith(before):
                return after + old[len(before) :]
        return old

    save_file({name(old): tensor for old, tensor in tensors.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("row", ["llava_next", "gemma3_image"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_every_generation_are_found(spelling, row, checkpoint, tmp_path):
    folder = respelled(checkpoint(row), tmp_path / "other", SPELLINGS[spelling])
    model, other = load_model(checkpoint(row)), load_model(folder)
    assert torch.equal(model.sight.features(DATA), other.sight.features(DATA))
    assert torch.equal(model.decoder.head.weight.weight.dense(), other.decoder.head.weight.weight.dense())


def test_a_tensor_of_the_encoder_that_is_missing_is_named(checkpoint, tmp_path):
    folder = respelled(checkpoint("idefics2"), tmp_path / "other", {"model.connector.perceiver_resampler.latents": "elsewhere"})
    with pytest.raises(Exception, match=r"model\.connector\.perceiver_resampler\.latents"):
        load_model(folder)


@pytest.mark.parametrize("row", ["llava_next", "idefics2", "gemma3_image"])
def test_the_encoder_is_counted_among_the_weights(row, checkpoint):
    one, two = inspect_model(checkpoint(row)), inspect_model(checkpoint(row), world=2)
    model = load_model(checkpoint(row), dtype="float32")
    tensors = load_file(checkpoint(row) / "model.safetensors")
    language = sum(t.numel() for name, t in tensors.items() if "language_model" in name or "text_model" in name or name == "lm_head.weight")
    seen = one.rank_weight_bytes // 4 - language
    assert one.rank_weight_bytes == model.weight_bytes and seen > 20_000
    assert two.rank_weight_bytes - 4 * seen == pytest.approx((one.rank_weight_bytes - 4 * seen) / 2, rel=0.05)


def test_formats_made_at_load_leave_the_encoder_plain(checkpoint):
    model, plain = load_model(checkpoint("llava_next"), quantize="int8"), load_model(checkpoint("llava_next"))
    assert not isinstance(model.linears[0].weight, DenseLinear)
    assert torch.equal(model.sight.features(DATA), plain.sight.features(DATA))


def test_features_in_bfloat16_stay_near_those_in_float32(checkpoint):
    exact = load_model(checkpoint("idefics2"), dtype="float32").sight.features(DATA)
    rough = load_model(checkpoint("idefics2"), dtype="bfloat16").sight.features(DATA)
    assert rough.dtype == torch.bfloat16 and ((rough - exact).std() / exact.std()) < 0.1


def test_an_adapter_that_changes_the_encoder_is_refused_by_name(checkpoint, tmp_path):
    write_adapter(tmp_path, checkpoint("llava_next"), r=2, lora_alpha=2, target_modules=["q_proj"])
    model = load_model(checkpoint("llava_next"))
    with pytest.raises(AdapterError, match=r"nothing in this model takes .*vision_tower\.encoder\.layers\.0\.self_attn\.q_proj"):
        read_adapter(tmp_path, model.linears, model.dtype)


def test_an_adapter_made_for_an_earlier_class_is_the_same_adapter(checkpoint, tmp_path):
    write_adapter(tmp_path, checkpoint("llava_next"), r=2, lora_alpha=2, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    model = load_model(checkpoint("llava_next"))
    today = read_adapter(tmp_path, model.linears, model.dtype)

    def older(tensors):
        for name in list(tensors):
            tensors[name.replace("model.language_model.", "language_model.model.")] = tensors.pop(name)

    edit_tensors(tmp_path, older)
    before = read_adapter(tmp_path, model.linears, model.dtype)
    assert before.deltas.keys() == today.deltas.keys() and len(today.deltas) == 4
    assert all(torch.equal(a.bt, b.bt) for site in today.deltas for a, b in zip(today.deltas[site], before.deltas[site]))
