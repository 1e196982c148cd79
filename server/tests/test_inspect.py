"""What `inspect` says of a folder, and how it refuses a faulty one. Headers only: the weights here are zeros or nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kvrun import inspect
from kvrun.errors import ConfigError, FilesError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "vocab_size": 100,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
WIDTHS = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
MLP = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
PARAMETERS = 2 * 100 * 64 + 64 + 2 * (2 * 64 + sum(a * b for a, b in (*WIDTHS.values(), *MLP.values())))


def tensors() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the tiny Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100, 64), "lm_head.weight": (100, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}.weight": shape for name, shape in WIDTHS.items()}
        shapes |= {f"{at}.mlp.{name}.weight": shape for name, shape in MLP.items()}
        shapes |= {f"{at}.{name}.weight": (64,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], **wrong: object) -> None:
    """A safetensors file of bfloat16 zeros; `wrong` replaces fields of its first tensor's header entry."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    next(iter(header.values())).update(wrong)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(at))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model folder in one file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    write_safetensors(tmp_path / "model.safetensors", tensors())
    return tmp_path


def adapter(folder: Path, ranks: tuple[int, ...] = (4, 8)) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": ranks[0], "peft_type": "LORA"}))
    shapes = {}
    for layer, rank in enumerate(ranks):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        shapes |= {f"{at}.lora_A.weight": (rank, 64), f"{at}.lora_B.weight": (64, rank)}
    write_safetensors(folder / "adapter_model.safetensors", shapes)
    return folder


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = inspect.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_model_s_sizes_come_from_its_headers(folder):
    facts = inspect.inspect_model(folder)
    assert (facts.architecture, facts.dtype, facts.parameters) == ("LlamaForCausalLM", "bfloat16", PARAMETERS)
    assert facts.rank_weight_bytes == 2 * PARAMETERS
    assert (facts.page_tokens, facts.max_positions) == (16, 512)
    assert facts.page_bytes == 2 * 2 * 2 * 16 * 16 * 2  # layers, key and value, heads, head width, tokens, bytes


def test_another_number_format_takes_other_space(folder):
    assert inspect.inspect_model(folder, "float32").rank_weight_bytes == 4 * PARAMETERS
    with pytest.raises(ConfigError, match="int3"):
        inspect.inspect_model(folder, "int3")


def test_two_ranks_share_the_weights_and_the_cache(folder):
    one, two = inspect.inspect_model(folder), inspect.inspect_model(folder, world=2)
    norms = 5 * 64 * 2
    assert two.rank_weight_bytes == (one.rank_weight_bytes - norms) // 2 + norms
    assert two.page_bytes == one.page_bytes // 2


def test_adapters_of_mixed_ranks_are_measured(folder, tmp_path, capsys):
    first, second = adapter(tmp_path / "a"), adapter(tmp_path / "b", (16,))
    code, out, _ = run(folder, "--json", "--lora", f"a={first};b={second};", capsys=capsys)
    found = json.loads(out)["adapters"]
    assert code == 0
    assert [(f["name"], f["rank_min"], f["rank_max"], f["bytes"]) for f in found] == [
        ("a", 4, 8, 2 * 2 * 64 * 12),
        ("b", 16, 16, 2 * 2 * 64 * 16),
    ]


def test_the_readable_form_names_every_fact(folder, capsys):
    code, out, _ = run(folder, capsys=capsys)
    assert code == 0
    assert f"parameters           {PARAMETERS}" in out and str(folder) in out


def test_no_tensor_library_is_imported(folder):
    asked = f"inspect.main([{str(folder)!r}])"
    code = f"import sys; from kvrun import inspect; {asked}; print(not {{'torch', 'grpclib'}}.isdisjoint(sys.modules))"
    root = Path(inspect.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def write_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}))


FAULTS = {
    "short": (cut_short, "short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "short"),
    "a pointer": (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs\noid sha256:0\n"), "git lfs pull"),
    "noise": (lambda f: (f / "model.safetensors").write_bytes(bytes([200]) + bytes(7) + b"x" * 300), "corrupt"),
    "a huge header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "short or no safetensors"),
    "a shard file is missing": (write_index, "gone.safetensors"),
    "a bad index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index"),
    "offsets": (lambda f: write_safetensors(f / "model.safetensors", tensors(), shape=[100, 65]), "corrupt"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_named_and_end_with_11(folder, capsys, fault):
    damage, words = FAULTS[fault]
    damage(folder)
    with pytest.raises(FilesError, match=words):
        inspect.inspect_model(folder)
    code, out, err = run(folder, "--json", capsys=capsys)
    assert (code, out) == (11, "")
    assert str(folder) in err


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "architectures"])
def test_a_config_without_a_field_is_named_and_ends_with_10(folder, capsys, field):
    (folder / "config.json").write_text(json.dumps({key: value for key, value in CONFIG.items() if key != field}))
    code, _, err = run(folder, capsys=capsys)
    assert code == 10
    assert field in err


def test_an_unknown_architecture_ends_with_10(folder, capsys):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["LamaForCausalLM"]}))
    code, _, err = run(folder, capsys=capsys)
    assert code == 10
    assert "LlamaForCausalLM" in err


ADAPTER_FAULTS = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), 11, "adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), 11, "adapter_model.safetensors"),
    "pickles": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), 11, "pickled"),
    "short": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\1"), 11, "short"),
    "no rank": (lambda f: (f / "adapter_config.json").write_text("{}"), 10, "field r"),
    "no LoRA": (lambda f: write_safetensors(f / "adapter_model.safetensors", {"x": (2,)}), 11, "lora_A"),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_faulty_adapters_are_named(folder, tmp_path, capsys, fault):
    damage, expected, words = ADAPTER_FAULTS[fault]
    damage(adapter(tmp_path / "poet"))
    code, _, err = run(folder, "--lora", f"poet={tmp_path / 'poet'}", capsys=capsys)
    assert code == expected
    assert words in err and "poet" in err


def test_wrong_arguments_end_with_10(folder, capsys):
    assert run(folder, "--lora", "just-a-name", capsys=capsys)[0] == 10
    assert run(folder, "--world-size", "0", capsys=capsys)[0] == 10
    assert run(folder / "nowhere", capsys=capsys)[0] == 11
