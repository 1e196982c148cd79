"""Weights kept as the kernels read them: the same model to the bit, and never a stale one."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from kvrun.nn.build import load_model
from kvrun.nn.loaded import LoadedModel
from kvrun.quant import packed_cache
from kvrun.weights.load import Loader

WAYS = [
    ("llama", {"dtype": "float32"}),
    ("llama_tied", {"dtype": "bfloat16"}),
    ("gpt2", {"dtype": "float32", "quantize": "int4"}),
    ("mixtral", {"dtype": "float32", "quantize": "int8"}),
    ("deepseek_v3", {"dtype": "float32"}),
    ("cohere", {"dtype": "float32", "quantize": "bitsandbytes-nf4"}),
    ("flan_t5", {"dtype": "float32", "quantize": "fp8"}),
    ("idefics2", {"dtype": "float32"}),
]


@pytest.fixture(autouse=True)
def _warnings_are_heard():
    """Whatever other tests turned off."""
    logging.disable(logging.NOTSET)


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A model that a test may write to."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def products(model: LoadedModel) -> list[torch.Tensor]:
    """What every linear makes of the same few rows."""
    made = []
    for linear in model.linears:
        x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0)).to(model.dtype)
        made.append(linear.weight.matmul(x, linear.bias))
    return made


def equal(a: LoadedModel, b: LoadedModel) -> bool:
    return all(torch.equal(one, other) for one, other in zip(products(a), products(b), strict=True))


@pytest.mark.parametrize("row,how", WAYS, ids=[row for row, _ in WAYS])
def test_a_second_start_computes_the_same(row, how, checkpoint, tmp_path):
    plain, first = load_model(checkpoint(row), **how), load_model(checkpoint(row), packed_cache=tmp_path, **how)
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    second = load_model(checkpoint(row), packed_cache=tmp_path, **how)
    assert kept.stat().st_mtime_ns == written and [*tmp_path.iterdir()] == [kept]
    assert equal(plain, first) and equal(plain, second)
    assert second.weight_bytes == plain.weight_bytes


def test_the_second_start_reads_no_weight_of_the_checkpoint_again(folder, tmp_path, monkeypatch):
    load_model(folder, packed_cache=tmp_path / "kept")
    read = []
    for way in ("linear", "rows"):
        monkeypatch.setattr(Loader, way, lambda *_: read.append(_))
    load_model(folder, packed_cache=tmp_path / "kept")
    assert read == []
    with pytest.raises(TypeError):  # which is how a first start would end
        load_model(folder, packed_cache=tmp_path / "other")


def test_each_way_to_load_has_weights_of_its_own(folder, tmp_path):
    kept = tmp_path / "kept"
    for how in ({}, {"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int8", "activation_dtype": "int8"}):
        before = len([*kept.iterdir()]) if kept.exists() else 0
        load_model(folder, packed_cache=kept, **how)
        assert len([*kept.iterdir()]) == before + 1


def test_another_program_packs_anew(folder, tmp_path, monkeypatch):
    program, kept = tmp_path / "program", tmp_path / "kept"
    program.mkdir()
    monkeypatch.setattr(packed_cache, "PACKAGES", (program,))
    for source in ("rounds one way", "rounds the other way"):
        (program / "made.py").write_text(source)
        load_model(folder, packed_cache=kept)
    assert len([*kept.iterdir()]) == 2


def test_a_checkpoint_written_anew_is_packed_anew(folder, tmp_path):
    load_model(folder, packed_cache=tmp_path / "kept")
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-64:] = bytes(64)
    weights.write_bytes(content)
    os.utime(weights, ns=(1, 1))
    assert equal(load_model(folder, packed_cache=tmp_path / "kept"), load_model(folder))
    assert len([*(tmp_path / "kept").iterdir()]) == 2


@pytest.mark.parametrize("harm", (lambda file: os.truncate(file, file.stat().st_size - 1), lambda file: file.write_bytes(b"nothing")))
def test_a_broken_file_is_said_and_written_anew(folder, tmp_path, harm, caplog):
    load_model(folder, packed_cache=tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    size = kept.stat().st_size
    harm(kept)
    assert equal(load_model(folder, packed_cache=tmp_path / "kept"), load_model(folder))
    assert "packed anew" in caplog.text and str(kept) in caplog.text
    assert kept.stat().st_size == size


def test_a_folder_that_takes_nothing_keeps_no_model_from_serving(folder, tmp_path, caplog):
    (tmp_path / "kept").write_text("a file, not a folder")
    assert equal(load_model(folder, packed_cache=tmp_path / "kept"), load_model(folder))
    assert "cannot be kept" in caplog.text
