"""`quantize` writes what `--quantize` makes at load, as a folder that transformers reads too, whole or not at all."""

import json
import shutil
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from driver import answers
from kvrun.cli import main
from kvrun.errors import FilesError
from kvrun.inspect import inspect_model
from kvrun.nn.build import load_model
from kvrun.quant.coded import CodedLinear
from kvrun.quantize import calibrated, convert, output
from kvrun.quantize.convert import Conversion
from kvrun.quantize.layout import LM_HEAD, ignored, layout
from kvrun.spec import model_of
from kvrun.spec.config import Config
from kvrun.weights.checkpoint import INDEX, Checkpoint
from ragged import Runner
from safetensors.torch import load_file
from tiny import ROWS, auto

METHODS = ("int8", "int4", "fp8")
SINGLE = "model.safetensors"
PROMPT = [5, 17, 99, 200, 3, 44, 7, 8, 120, 33]
# One row for each way in which checkpoints lay linears out; what `int4` leaves plain for its widths is in none of them.
LAYOUTS = ("llama", "llama_tied", "phi3", "gpt_neox", "bloom", "falcon7b", "gpt2", "mixtral", "mamba2", "opt", "idefics2")
# Their classes in transformers read `.weight` past the module, which is there when all of it is read back at once.
PAST_THE_MODULE = ("falcon7b", "mamba2")
# transformers stores linears of these as no linear, and looks for none of their codes.
NO_LINEAR = ("gpt2",)


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    """(row, method) -> the folder that the command wrote, once."""
    at, done = tmp_path_factory.mktemp("written"), {}

    def folder(row: str, method: str) -> Path:
        if (row, method) not in done:
            done[row, method] = at / f"{row}-{method}"
            assert main(["quantize", str(checkpoint(row)), str(done[row, method]), "--method", method]) == 0
        return done[row, method]

    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", LAYOUTS)
def test_stored_codes_are_to_the_bit_those_made_at_load(row, method, checkpoint, written):
    stored = load_model(written(row, method), dtype="float32")
    made = load_model(checkpoint(row), dtype="float32", quantize=method)
    coded = 0
    for one, other in zip(stored.linears, made.linears, strict=True):
        assert type(one.weight) is type(other.weight), one.sources[0].module
        if isinstance(one.weight, CodedLinear):
            coded += 1
            assert torch.equal(one.weight.packed.panels, other.weight.packed.panels), one.sources[0].module
            assert torch.equal(one.weight.packed.scales, other.weight.packed.scales), one.sources[0].module
            assert one.weight.packed.scales.dtype == other.weight.packed.scales.dtype
        assert torch.equal(one.weight.dense(), other.weight.dense()), one.sources[0].module
    assert coded and stored.quantize == "compressed-tensors"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", [row for row in LAYOUTS if row not in NO_LINEAR])
def test_transformers_computes_with_what_was_written_what_the_shard_computes(row, method, written):
    from transformers import CompressedTensorsConfig

    folder, more = written(row, method), {}
    if row in PAST_THE_MODULE:
        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, found = auto(ROWS[row]).from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    shard = Runner()
    shard.load(folder)
    # Where the shard makes the plain head int8, it is to be that one in both.
    head = next(linear for linear in shard.model.linears if linear.sources[0].also == "lm_head")
    assert isinstance(head.weight, CodedLinear) == (method != "fp8")
    model.get_output_embeddings().weight = torch.nn.Parameter(head.weight.dense())
    with torch.inference_mode():
        wanted = ROWS[row].logits(model.eval(), torch.tensor([PROMPT]))[0]
    # Where it reads weights back at once, or experts, it rounds them to the type of their scales.
    rounded = method == "int4" and row in (*PAST_THE_MODULE, "mixtral")
    room = 0.02 * wanted.abs().max().item() if rounded else 1e-3
    torch.testing.assert_close(shard.step([(0, PROMPT)]), wanted, rtol=1e-3, atol=room)


def test_greedy_answers_are_those_of_the_format_made_at_load(checkpoint, written, tmp_path):
    (stored,) = answers(written("llama", "int4"), PROMPT, tmp_path)
    assert [stored] == answers(checkpoint("llama"), PROMPT, tmp_path, quantize="int4") and len(set(stored)) > 3


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_small_and_whole_and_known_from_its_headers(method, checkpoint, written):
    source, folder = checkpoint("llama"), written("llama", method)
    assert {file.name for file in folder.iterdir()} == {file.name for file in source.iterdir() if file.is_file()}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    fields = json.loads((folder / "config.json").read_bytes())
    assert fields.pop("quantization_config")["ignore"][0] == LM_HEAD and fields == json.loads((source / "config.json").read_bytes())
    kept = {name for name in load_file(source / SINGLE) if "_proj" not in name}
    stored = load_file(folder / SINGLE)
    assert kept < set(stored) and (folder / SINGLE).stat().st_size < (source / SINGLE).stat().st_size * 0.6
    assert inspect_model(folder, "float32").rank_weight_bytes == pytest.approx(load_model(folder, dtype="float32").weight_bytes, rel=0.05)
    assert folder.stat().st_mode & 0o777 == (folder / SINGLE).stat().st_mode & 0o777 | 0o111 == source.stat().st_mode & 0o777 | 0o055


@pytest.mark.parametrize("group", [32, 64])
def test_groups_are_as_long_as_asked(group, checkpoint, tmp_path):
    out = tmp_path / "out"
    assert main(["quantize", str(checkpoint("llama")), str(out), "--method", "int4", "--group-size", str(group)]) == 0
    scales = load_file(out / SINGLE)["model.layers.0.self_attn.q_proj.weight_scale"]
    assert scales.shape == (64, 64 // group)
    load_model(out)


def test_inputs_that_fill_no_groups_stay_plain_and_are_named(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(checkpoint("qwen3_moe")), str(out), "--method", "int4"]) == 0
    assert "experts.0.down_proj" in capsys.readouterr().err
    stored = load_file(out / SINGLE)
    down, up = ("model.layers.0.mlp.experts.0.down_proj", "model.layers.0.mlp.experts.0.up_proj")
    assert f"{down}.weight" in stored and f"{up}.weight_packed" in stored
    patterns = json.loads((out / "config.json").read_bytes())["quantization_config"]["ignore"]
    assert r"re:(.*\.)?model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj$" in patterns
    load_model(out)


def test_files_are_cut_between_tensors_and_no_more_than_one_is_held(checkpoint, tmp_path, monkeypatch):
    source, most, held = checkpoint("mixtral"), 70_000, []

    def saved(tensors, path, metadata):
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, path, metadata=metadata)

    save = convert.save_file
    monkeypatch.setattr(convert, "save_file", saved)
    seen: list[int] = []
    conversion = Conversion(Checkpoint.open(source), model_of(Config.read(source)), layout("int4", None))
    conversion.write(tmp_path, seen.append, most)
    assert len(held) > 3 and max(held) <= most and sum(held) == conversion.written_bytes
    assert sum(seen) == conversion.read_bytes
    index = json.loads((tmp_path / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == conversion.written_bytes
    assert {name for file in set(index["weight_map"].values()) for name in load_file(tmp_path / file)} == set(index["weight_map"])
    output.write_config(source, tmp_path, layout("int4", None).config([], []))
    output.copy_others(source, tmp_path)
    for one, other in zip(load_model(tmp_path).linears, load_model(source, quantize="int4").linears, strict=True):
        assert torch.equal(one.weight.dense(), other.weight.dense()), one.sources[0].module


def test_modules_of_all_layers_share_a_pattern_unless_one_of_them_is_coded():
    gates = [f"model.layers.{i}.mlp.gate" for i in range(12)]
    assert ignored(["model.layers.0.mlp.up"], gates) == [LM_HEAD, r"re:(.*\.)?model\.layers\.\d+\.mlp\.gate$"]
    assert ignored(["a.0.up"], ["a.1.up"]) == [LM_HEAD, r"re:(.*\.)?a\.1\.up$"]


Usage = namedtuple("Usage", "total used free")
CALIBRATION = ("--calibration", "text.txt")
REFUSED = {
    "a folder that holds something": ("llama", "filled", ("--method", "int4"), 10, "is there already and nothing is overwritten"),
    "a folder in the model's": ("llama", "model/out", ("--method", "int4"), 10, "whose files are being read"),
    "codes again": ("coded", "out", ("--method", "int8"), 10, "is quantized already, with compressed-tensors"),
    "experts in one tensor": ("dbrx", "out", ("--method", "int8"), 10, "ffn.experts.mlp.w1 holds several experts"),
    "no folder": ("nowhere", "out", ("--method", "int4"), 11, "download-weights"),
    "a method unknown": ("llama", "out", ("--method", "int3"), 10, "invalid choice: 'int3'"),
    "no method": ("llama", "out", (), 10, "--method"),
    "groups where there are none": ("llama", "out", ("--method", "fp8", "--group-size", "64"), 10, "one scale for each output"),
    "no text to read": ("llama", "out", ("--method", "gptq"), 10, "one document a line"),
    "text without use": ("llama", "out", ("--method", "int4", *CALIBRATION), 10, "needs no data"),
    "weights that are short": ("short", "out", ("--method", "int4"), 11, "download it again"),
    "too little disk": ("llama", "out", ("--method", "int4"), 11, "are free on its disk"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written_is_said_before_any_work(what, checkpoint, written, tmp_path, monkeypatch, capsys):
    row, out, flags, code, said = REFUSED[what]
    folder = tmp_path / "model"
    if row in ROWS:
        shutil.copytree(checkpoint(row), folder)
    elif row == "coded":
        shutil.copytree(written("llama", "int4"), folder)
    elif row == "short":
        shutil.copytree(checkpoint("llama"), folder)
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-8])
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "file").touch()
    if what == "too little disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**6, 10**6, 1000))
    before = sorted(tmp_path.rglob("*"))
    assert main(["quantize", str(folder), str(tmp_path / out), *flags]) == code
    assert said in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stop,code", [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 11)])
def test_what_was_begun_and_not_ended_leaves_nothing(stop, code, checkpoint, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        assert len(list(tmp_path.iterdir())) == 1  # where it writes meanwhile
        raise stop

    monkeypatch.setattr(convert, "save_file", fail)
    assert main(["quantize", str(checkpoint("llama")), str(tmp_path / "out"), "--method", "int4"]) == code
    assert not list(tmp_path.iterdir()) and str(tmp_path / "out") in capsys.readouterr().err


def test_an_empty_folder_is_taken(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    assert main(["quantize", str(checkpoint("llama")), str(tmp_path / "out"), "--method", "fp8"]) == 0
    load_model(tmp_path / "out")


def test_methods_that_read_text_name_what_must_be_installed(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrated, "find_spec", lambda _: None)
    (tmp_path / "text.txt").write_text("a\n")
    argv = ["quantize", str(checkpoint("llama")), str(tmp_path / "out"), "--calibration", str(tmp_path / "text.txt")]
    assert main([*argv, "--method", "gptq"]) == 10 and "pip install 'kvrun[quantize]'" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_text_is_a_document_a_line(tmp_path):
    (plain := tmp_path / "text.txt").write_text("one\n\ntwo\n")
    (fields := tmp_path / "text.jsonl").write_text('{"text": "one\\nmore"}\n{"text": "two"}\n')
    assert calibrated.documents(plain) == ["one", "two"] and calibrated.documents(fields) == ["one\nmore", "two"]
    (plain).write_text("\n")
    with pytest.raises(FilesError, match="holds no text"):
        calibrated.documents(plain)
    fields.write_text('{"words": 1}\n')
    for wrong in (fields, tmp_path / "nowhere.txt"):
        with pytest.raises(FilesError, match="a document a line"):
            calibrated.documents(wrong)


@pytest.mark.skipif(find_spec("llmcompressor") is None, reason="llm-compressor is not installed: pip install 'kvrun[quantize]'")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_that_read_text_write_what_the_shard_and_transformers_read(method, checkpoint, tmp_path):
    from transformers import CompressedTensorsConfig

    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"{i} beds, {i * i} bells and a bee\n" for i in range(12)))
    argv = ["quantize", str(checkpoint("llama")), str(out), "--method", method, "--group-size", "32", "--calibration", str(text)]
    assert main(argv) == 0
    assert (out / "tokenizer.json").read_bytes() == (checkpoint("llama") / "tokenizer.json").read_bytes()
    # transformers makes no room for zeros in integers, and reads them where it makes plain numbers of all codes.
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if method == "awq" else {}
    model = auto(ROWS["llama"]).from_pretrained(out, dtype=torch.float32, **more).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPT])).logits[0]
    shard = Runner()
    shard.load(out)
    torch.testing.assert_close(shard.step([(0, PROMPT)]), wanted, rtol=1e-3, atol=1e-3)
