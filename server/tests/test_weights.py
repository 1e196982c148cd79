"""Who holds what, and what a checkpoint must and must not contain."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvrun import models
from kvrun.dist import Group
from kvrun.errors import ConfigError, FilesError, Unsupported
from kvrun.nn.build import load_model
from kvrun.weights.checkpoint import Checkpoint
from kvrun.weights.load import whole
from kvrun.weights.naming import probe
from kvrun.weights.plan import Cut, plan_model
from kvrun.weights.shard import Axes
from kvrun.weights.split import Split, merge, size
from kvrun.weights.vocabulary import vocabulary_limit
from ragged import Runner
from safetensors.torch import load_file, save_file
from tiny import ROWS, oracle, write_checkpoint

PROMPT = [5, 17, 99, 200, 3, 44, 7, 8, 120, 33]


@pytest.fixture
def copy(checkpoint, tmp_path) -> Callable[[str], Path]:
    """row -> a folder of this test's own."""
    return lambda row: Path(shutil.copytree(checkpoint(row), tmp_path / row))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a folder's one file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path)


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    runner = Runner()
    runner.load(folder, dtype)
    return runner.step([(0, PROMPT)])


class Alone(Group):
    """One rank of a group that is never asked to talk."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)


@given(st.integers(1, 16), st.integers(1, 12), st.integers(1, 16))
def test_every_query_head_lies_on_one_rank_beside_the_key_it_reads(kv_heads, group, world):
    heads = kv_heads * group
    if world > heads:
        with pytest.raises(Unsupported, match=f"{heads} attention heads cannot be split over {world} ranks; use at most {heads}"):
            Split(0, world).heads(heads, kv_heads)
        return
    shares = [Split(rank, world).heads(heads, kv_heads) for rank in range(world)]
    assert [h for share in shares for h in range(*share.query)] == list(range(heads))
    for share in shares:
        assert share.heads % share.kv_heads == 0, "the kernels take query heads to divide evenly over key heads"
        for i, head in enumerate(range(*share.query)):
            assert share.kv[0] + i // (share.heads // share.kv_heads) == head // group
    assert max(s.kv_heads for s in shares) - min(s.kv_heads for s in shares) <= 1


@given(st.integers(0, 1000), st.integers(1, 16))
def test_spans_cover_everything_once_and_differ_by_at_most_one(total, world):
    spans = [Split(rank, world).span(total) for rank in range(world)]
    assert [i for span in spans for i in range(*span)] == list(range(total))
    sizes = Split(0, world).sizes(total)
    assert [stop - start for start, stop in spans] == list(sizes)
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9))))
def test_merging_keeps_the_indices_and_their_order(lengths):
    runs = [(start, start + length) for start, length in lengths]
    merged = merge(runs)
    assert [i for run in merged for i in range(*run)] == [i for run in runs for i in range(*run)]
    assert size(merged) == sum(length for _, length in lengths)
    assert all(before[1] != after[0] for before, after in pairwise(merged))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("row", ROWS)
def test_sources_say_which_rows_and_columns_of_the_checkpoint_a_linear_holds(row, world, checkpoint):
    folder = checkpoint(row)
    tensors = load_file(folder / "model.safetensors")
    for rank in range(world):
        loaded = load_model(folder, dtype="float32", group=Alone(rank, world))
        naming = probe(loaded.spec, tensors)
        planned = {cut.module: (cut, plan) for plan in plan_model(loaded.spec, Split(rank, world)).all_linears() for cut in plan.cuts}
        assert [linear.site for linear in loaded.linears] == list(range(len(loaded.linears)))
        for linear in loaded.linears:
            if linear.sources[0].module not in planned:
                continue  # the head, which is planned as a table
            dense, bias = linear.weight.dense(), linear.bias
            assert dense.shape == (linear.out_features, linear.in_features)
            assert linear.out_features == sum(len(source.rows) for source in linear.sources)
            for source in linear.sources:
                cut, plan = planned[source.module]
                if cut.bare or (cut.out_features, cut.in_features) != (source.out_features, source.in_features):
                    continue  # a tensor that its mixer takes apart
                stored = tensors[naming(cut.tensor("weight"))]
                stored = stored if cut.index is None else stored[cut.index[0]]
                stored = stored.T if plan.transposed else stored
                assert stored.shape == (source.out_features, source.in_features)
                part = slice(source.column, source.column + len(source.rows))
                columns = slice(None) if source.cols is None else source.cols
                assert torch.equal(dense[part], stored[source.rows][:, columns])
                if bias is not None:
                    biases = tensors[naming(cut.tensor("bias"))]
                    biases = biases if cut.index is None else biases[cut.index[0]]
                    assert torch.equal(bias[part], biases[source.rows])
            assert (bias is not None) == (plan.bias and (linear.role != "row" or rank == 0))


def test_more_ranks_than_heads_are_refused_with_the_count_that_would_do(checkpoint):
    with pytest.raises(Unsupported, match="4 attention heads cannot be split over 5 ranks; use at most 4"):
        load_model(checkpoint("llama"), group=Alone(0, 5))


def test_a_checkpoint_in_several_files_loads_like_one(checkpoint, tmp_path):
    folder = write_checkpoint("llama", tmp_path / "sharded", max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(logits(folder), logits(checkpoint("llama")))


def test_a_missing_shard_is_named(tmp_path):
    folder = write_checkpoint("llama", tmp_path / "sharded", max_shard_size="60KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FilesError, match=rf"lacks {gone.name}, which model\.safetensors\.index\.json names; download") as error:
        load_model(folder)
    assert error.value.exit_code == 11


@pytest.mark.parametrize("weight_map", [None, 3, {"a": "../other/model.safetensors"}])
def test_an_index_that_is_none_is_refused(weight_map, copy):
    folder = copy("llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FilesError, match=r"index\.json (is not an index of weights|names \.\./other/)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"is short: its tensors take \d+ bytes, it holds \d+; download"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is short or no safetensors file"),
        (lambda path: path.write_bytes(b""), "is short or no safetensors file: it has 0 bytes"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "LFS pointer.*git lfs pull"),
        (lambda path: path.write_bytes(b"\x10" + bytes(7) + b"{not json at all" + bytes(64)), "is corrupt"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F16"', 1)), r"is corrupt: .* is F16 .* in \d+ bytes"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), r"only pickled weights \(pytorch_model\.bin\).*convert"),
        (lambda path: path.unlink(), r"holds no \*\.safetensors"),
    ],
)
def test_a_damaged_file_is_named_with_the_cure(damage, says, copy):
    folder = copy("llama")
    damage(folder / "model.safetensors")
    with pytest.raises(FilesError, match=says) as error:
        load_model(folder)
    assert str(folder) in str(error.value)


def test_a_tensor_in_two_files_is_refused(copy):
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(FilesError, match=r"lies in both .*a\.safetensors and .*b\.safetensors"):
        load_model(folder)


def test_missing_tensors_are_named(copy):
    folder = copy("llama")
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(FilesError, match=r"lacks 1 tensor \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_model(folder)


def test_at_most_ten_missing_tensors_are_named(copy):
    folder = copy("llama")
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(FilesError, match=r"lacks 18 tensors \(model\.layers\.2\..* and 8 more\)"):
        load_model(folder)


def test_tensors_that_nobody_reads_are_named(copy):
    folder = copy("llama")
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(FilesError, match=r"holds 9 tensors \(model\.layers\.1\."):
        load_model(folder)
    folder = copy("qwen2")
    rewrite(folder, lambda tensors: {**tensors, "model.layers.0.self_attn.o_proj.bias": torch.ones(64)})
    with pytest.raises(FilesError, match=r"holds 1 tensor \(model\.layers\.0\.self_attn\.o_proj\.bias\) that nobody would read"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy):
    folder = copy("llama")
    edit_config(folder, intermediate_size=80)
    with pytest.raises(FilesError, match=r"gate_proj\.weight is \[96, 64\], not \[80, 64\] as config\.json says"):
        load_model(folder)
    folder = copy("gpt2")
    rewrite(folder, lambda tensors: {n: t.T if n.endswith("h.0.attn.c_attn.weight") else t for n, t in tensors.items()})
    with pytest.raises(FilesError, match=r"c_attn\.weight is \[192, 64\], not \[64, 192\]"):
        load_model(folder)


@pytest.mark.parametrize(
    ("row", "extra"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.1.attn.masked_bias": torch.ones(())}),
        ("falcon40b", {"transformer.h.0.self_attention.rotary_emb.inv_freq": torch.ones(8)}),
    ],
)
def test_known_leftovers_are_ignored(row, extra, copy, checkpoint):
    folder = copy(row)
    rewrite(folder, lambda tensors: {**tensors, **extra})
    assert torch.equal(logits(folder), logits(checkpoint(row)))


@pytest.mark.parametrize(
    ("row", "declared", "stored"),
    [
        ("gpt2", "transformer.", ""),
        ("llama", "model.", ""),
        ("llama", "model.", "language_model.model."),
        ("falcon40b", "transformer.", "model.transformer."),
    ],
)
def test_a_checkpoint_saved_under_another_prefix_loads(row, declared, stored, copy, checkpoint):
    folder = copy(row)
    rewrite(folder, lambda tensors: {n.replace(declared, stored, 1) if n.startswith(declared) else n: t for n, t in tensors.items()})
    assert torch.equal(logits(folder), logits(checkpoint(row)))
    assert load_model(folder).linears[0].sources[0].module.startswith(declared), "adapters are named by the declared prefix"


def test_a_tied_head_may_be_absent_stored_or_the_only_one_stored(copy, checkpoint):
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    absent = logits(checkpoint("llama_tied"))
    shared = load_model(checkpoint("llama_tied")).weight_bytes
    stored = copy("llama_tied")
    rewrite(stored, lambda tensors: {**tensors, head: tensors[embed].clone()})
    assert torch.equal(logits(stored), absent)
    assert load_model(stored).weight_bytes == shared + 259 * 64 * 4
    rewrite(stored, lambda tensors: {n: t for n, t in tensors.items() if n != embed})
    assert torch.equal(logits(stored), absent)
    assert load_model(stored).weight_bytes == shared


def test_an_untied_model_without_its_head_is_refused(copy):
    folder = copy("llama")
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    with pytest.raises(FilesError, match=r"lm_head\.weight"):
        load_model(folder)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_converted(stored, copy):
    folder = copy("llama")
    rewrite(folder, lambda tensors: {n: t.to(stored) for n, t in tensors.items()})
    (reference,) = oracle(folder, [PROMPT])
    assert (logits(folder) - reference).abs().max() / reference.std() < 5e-4


def test_auto_takes_the_type_of_the_config_and_else_of_the_weights(copy):
    folder = copy("llama")
    assert load_model(folder).dtype == torch.float32
    edit_config(folder, dtype="bfloat16")
    assert load_model(folder).dtype == torch.bfloat16
    edit_config(folder, dtype=None)
    rewrite(folder, lambda tensors: {n: t.half() for n, t in tensors.items()})
    assert load_model(folder).dtype == torch.float16


def test_what_cannot_be_honoured_is_refused_by_name(copy):
    folder = copy("llama")
    with pytest.raises(Unsupported, match=r"--quantize awq reads weights stored so, and config.json has no quantization_config"):
        load_model(folder, quantize="awq")
    with pytest.raises(Unsupported, match="--dtype int3"):
        load_model(folder, dtype="int3")
    edit_config(folder, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(Unsupported, match="quantized with aqlm, which is not served: it stores additive codebooks"):
        load_model(folder)
    edit_config(folder, quantization_config=None, hidden_act="softsign")
    with pytest.raises(Unsupported, match="activation softsign is not served; known are silu"):
        load_model(folder)
    edit_config(folder, hidden_act="silu", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    with pytest.raises(Unsupported, match="rope scaling spiral is not served"):
        load_model(folder)


def test_a_config_without_a_field_names_it(copy):
    folder = copy("llama")
    edit_config(folder, intermediate_size=None)
    with pytest.raises(ConfigError, match=r"config\.json: the field intermediate_size .* is missing"):
        load_model(folder)


def test_a_loaded_model_says_what_it_is(checkpoint):
    loaded = load_model(checkpoint("llama"), dtype="float32")
    count = sum(t.numel() for t in load_file(checkpoint("llama") / "model.safetensors").values())
    assert (loaded.parameters, loaded.weight_bytes) == (count, 4 * count)
    assert (loaded.architecture, loaded.vocabulary, loaded.vocabulary_limit) == ("LlamaForCausalLM", 259, 259)
    assert (loaded.positions, loaded.end_tokens) == (512, (2,))
    assert loaded.page_bytes(16) == 2 * 2 * 2 * 16 * 16 * 4  # layers, key and value, heads, tokens, width, bytes
    assert loaded.pool(3).bytes == 3 * loaded.page_bytes()
    assert loaded.pool(3).kv.layers[0].shape == (3, 2, 2, 16, 16)


def test_the_digest_follows_config_and_weights_but_not_the_folder(copy, checkpoint):
    folder = copy("llama")
    digest = Checkpoint.open(checkpoint("llama")).digest
    assert Checkpoint.open(folder).digest == digest
    edit_config(folder, rms_norm_eps=0.1)
    assert Checkpoint.open(folder).digest != digest


def test_the_vocabulary_ends_at_the_last_token_the_tokenizer_knows(checkpoint, tmp_path):
    assert vocabulary_limit(checkpoint("llama"), 259) == 259
    assert vocabulary_limit(checkpoint("llama"), 320) == 259
    assert vocabulary_limit(checkpoint("llama"), 100) == 100
    assert vocabulary_limit(tmp_path, 320) == 320
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", 0.0]]}, "added_tokens": [{"id": 7}]}))
    assert vocabulary_limit(tmp_path, 320) == 8


def test_axes_cut_packed_and_grouped_tensors_and_refuse_to_cut_through_an_index():
    cut = Cut("layer.q_proj", rows=((8, 16), (32, 40)), cols=((64, 128),), out_features=64, in_features=128)
    assert Axes(0, 1).spans(cut, (64, 128)) == (((8, 16), (32, 40)), ((64, 128),))
    assert Axes(1, 0, out_per=8, inp_per=32).spans(cut, (4, 8)) == (((2, 4),), ((1, 2), (4, 5)))
    assert Axes(None, 0).spans(cut, (128,)) == (((64, 128),),)
    assert Axes(0, None).spans(cut, (64, 1)) == (((8, 16), (32, 40)), ((0, 1),))
    with pytest.raises(Unsupported, match=r"layer\.q_proj.*128 values together, and 64 to 128 cuts through"):
        Axes(0, 1, inp_per=128).spans(cut, (64, 1))


def test_reading_the_description_of_a_folder_opens_no_weights(copy):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    config, model = models.read(folder)
    assert config.architecture == "LlamaForCausalLM" and len(model.decoder.layers) == 2
    assert replace(model, positions=1) != model


def test_threads_that_come_at_once_read_the_same_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    stored = {f"t{number}": torch.full((64, 64), float(number)) for number in range(8)}
    save_file(stored, tmp_path / "model.safetensors")
    opened, together, read = Path.open, threading.Barrier(len(stored)), os.preadv

    def late(*args):
        time.sleep(0.1)  # the others have opened the file by then
        return read(*args)

    def slow(path: Path, *args, **options):
        if options.get("buffering") == 0:
            together.wait(10)  # all of them find no open file
        return opened(path, *args, **options)

    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(Path, "open", slow)
    monkeypatch.setattr(os, "preadv", late)
    with ThreadPoolExecutor(len(stored)) as pool:
        assert all(pool.map(lambda name: whole(checkpoint, name).equal(stored[name]), stored))
        for name in stored:
            assert whole(checkpoint, name).equal(stored[name])
