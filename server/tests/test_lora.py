"""Adapters answer as peft answers, at any rank, mixed with any others; what does not fit is refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from adapters import ADAPTERS, edit_config, edit_tensors, likeliest
from driver import Driver
from kvrun.dist import Group
from kvrun.engine.sampling import Sampling
from kvrun.errors import AdapterError, AdapterNotFound, AdapterTooLarge, ProtocolError
from kvrun.lora.adapter import read_adapter, targets
from kvrun.nn.build import load_model

COUNT = 64
PROMPTS = tuple(tuple(torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (1, 5, 17, 40))


@pytest.fixture(scope="module")
def llama(checkpoint):
    return load_model(checkpoint("llama"), dtype="float32", group=Group.single())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_answers_equal_those_of_peft(name, world, adapter, engines, checkpoint):
    row = ADAPTERS[name][0]
    ranks = engines(row, world)
    ranks.load(1, adapter(name))
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, COUNT, adapter=1)
        driver.add(100 + index, prompt, COUNT)
    answers = driver.run(chunk=24)
    with_adapter, base = ([answers[first + index] for index in range(len(PROMPTS))] for first in (0, 100))
    assert with_adapter == likeliest(checkpoint(row), adapter(name), list(zip(PROMPTS, with_adapter, strict=True)))
    assert base == likeliest(checkpoint(row), None, list(zip(PROMPTS, base, strict=True)))
    assert with_adapter != base and all(len(answer) == COUNT for answer in with_adapter)


@pytest.mark.parametrize("world", [1, 2])
def test_mixed_adapters_in_one_batch_answer_to_the_bit_as_each_alone(world, adapter, engines):
    ranks = engines("llama", world)
    names = [name for name, (row, _) in ADAPTERS.items() if row == "llama"]

    def run(mixture: list[int]) -> dict:
        ranks.reserve()
        for handle, name in enumerate(names, start=1):
            ranks.load(handle, adapter(name))
        driver = Driver(ranks.step)
        for index in mixture:
            sampling = Sampling(temperature=0.9, seed=index, top_logprobs=2) if index % 2 else Sampling(top_logprobs=2)
            driver.add(index, PROMPTS[index % len(PROMPTS)], 12, sampling, adapter=index % (len(names) + 1))
        driver.run(chunk=9)
        return driver.details

    everyone = list(range(2 * len(names) + 2))
    together = run(everyone)
    assert {index: run([index])[index] for index in everyone} == together


def test_a_rank_holds_its_own_part_and_counts_its_bytes(adapter, engines):
    one, two = engines("llama", 1), engines("llama", 2)
    whole = one.load(1, adapter("rank8"))
    parts = two.each(lambda engine: engine.adapters.load(1, "rank8", str(adapter("rank8"))))
    assert {part.digest for part in parts} == {whole.digest}
    assert whole.bytes == one.engines[0].adapters.bytes == sum(4 * 8 * (i + o) for i, o in _llama_shapes()) * 2
    assert all(whole.bytes / 2 < part.bytes < whole.bytes for part in parts)
    assert whole.matched == 28 and whole.ranks == (8,) * 14 and whole.targets == tuple(sorted(ADAPTERS["rank8"][1]["target_modules"]))


def _llama_shapes() -> list[tuple[int, int]]:
    """(in, out) of a layer's linears."""
    return [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]


def test_the_digest_is_that_of_the_content(adapter, tmp_path, llama):
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))
    first = read_adapter(adapter("rank1"), llama.linears, torch.float32).digest
    assert read_adapter(copy, llama.linears, torch.float32).digest == first
    edit_config(copy, lora_alpha=2)
    assert read_adapter(copy, llama.linears, torch.float32).digest != first


def test_names_without_peft_s_prefix_or_with_its_adapter_name_mean_the_same(adapter, tmp_path, llama):
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))

    def rename(tensors: dict) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")] = tensors.pop(name)

    edit_tensors(copy, rename)
    renamed, original = (read_adapter(folder, llama.linears, torch.float32) for folder in (copy, adapter("rank1")))
    for site, deltas in original.deltas.items():
        assert all(torch.equal(d.a, o.a) and torch.equal(d.bt, o.bt) for d, o in zip(renamed.deltas[site], deltas, strict=True))


def test_the_targets_an_adapter_may_name_are_the_checkpoint_s_modules(llama):
    seven = ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert targets(llama.linears) == seven
    assert targets(llama.linears, llama.decoder.embed) == sorted([*seven, "embed_tokens"])


REFUSED_FIELDS = {
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "trainable_token_indices": [5],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "peft_type": "IA3",
    "init_lora_weights": "pissa_niter_4",
    "something_of_tomorrow": True,
    "r": None,
    "rank_pattern": {"(": 3},
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_a_config_field_that_is_not_served_is_refused_by_name(field, adapter, tmp_path, llama):
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))
    edit_config(copy, **{field: REFUSED_FIELDS[field]})
    with pytest.raises(AdapterError, match=r"\(" if field == "rank_pattern" else "rank" if field == "r" else field):
        read_adapter(copy, llama.linears, torch.float32)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILED = {
    "model.layers.0.self_attn.q_proj.lora_A": lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(1, 60)}),
    "model.layers.0.self_attn.q_proj.lora_B is float32": lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(64, 2)}),
    "model.layers.1.self_attn.q_proj.lora_A": lambda t: t.pop(f"{Q.replace('.0.', '.1.')}.lora_B.weight"),
    "layers.7.self_attn.q_proj": lambda t: t.update({f"{Q.replace('.0.', '.7.')}.lora_A.weight": torch.zeros(1, 64)}),
    "w_proj.lora_A": lambda t: t.update({f"{Q.replace('q_proj', 'w_proj')}.lora_A.weight": torch.zeros(1, 64)}),
    "lora_magnitude_vector": lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(64)}),
    "lora_embedding_A": lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(1, 259)}),
    "lm_head": lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(259, 64)}),
    "lora_B.bias": lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(64)}),
    "not finite": lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")),
    "int64": lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(1, 64, dtype=torch.int64)}),
    "holds no tensor": lambda t: t.clear(),
}


@pytest.mark.parametrize("named", SPOILED)
def test_a_tensor_that_does_not_fit_is_refused_by_name(named, adapter, tmp_path, llama):
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))
    edit_tensors(copy, SPOILED[named])
    with pytest.raises(AdapterError, match=named):
        read_adapter(copy, llama.linears, torch.float32)


def test_at_most_ten_tensors_are_named(adapter, tmp_path, llama):
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))
    edit_tensors(copy, lambda t: t.update({f"stranger{i}": torch.zeros(1) for i in range(25)}))
    with pytest.raises(AdapterError, match=r"stranger0, .* and 15 more") as refused:
        read_adapter(copy, llama.linears, torch.float32)
    assert str(refused.value).count("stranger") == 10


def test_a_weight_that_overflows_the_model_s_dtype_is_refused(adapter, tmp_path, llama):
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))
    edit_tensors(copy, lambda t: t[f"{Q}.lora_B.weight"].fill_(1e6))
    read_adapter(copy, llama.linears, torch.float32)
    with pytest.raises(AdapterError, match="not finite in float16"):
        read_adapter(copy, llama.linears, torch.float16)


@pytest.mark.parametrize("broken", ["short", "pointer", "empty", "config"])
def test_a_damaged_file_is_refused(broken, adapter, tmp_path, llama):
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))
    weights = copy / "adapter_model.safetensors"
    if broken == "short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif broken == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif broken == "empty":
        weights.write_bytes(b"")
    else:
        (copy / "adapter_config.json").write_text("[1, 2")
    with pytest.raises(AdapterError, match=r"LFS" if broken == "pointer" else "JSON" if broken == "config" else "corrupt"):
        read_adapter(copy, llama.linears, torch.float32)


def test_a_pickle_is_never_read(adapter, tmp_path, llama):
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled"):
        read_adapter(copy, llama.linears, torch.float32)


def test_a_missing_folder_or_file_is_not_found(adapter, tmp_path, llama):
    with pytest.raises(AdapterNotFound, match="nowhere"):
        read_adapter(tmp_path / "nowhere", llama.linears, torch.float32)
    copy = Path(shutil.copytree(adapter("rank1"), tmp_path / "copy"))
    (copy / "adapter_config.json").unlink()
    with pytest.raises(AdapterNotFound, match=r"adapter_config\.json"):
        read_adapter(copy, llama.linears, torch.float32)


def test_the_table_keeps_to_its_budget_and_its_handles(adapter, engines):
    ranks = engines()
    table = ranks.engines[0].adapters
    needed = ranks.load(1, adapter("rank8")).bytes
    ranks.reserve(adapter_bytes=needed)
    ranks.load(1, adapter("rank8"))
    with pytest.raises(AdapterTooLarge, match=f"0 of {needed} are free"):
        ranks.load(2, adapter("rank1"))
    table.unload(1)
    table.unload(1)
    assert table.bytes == 0
    ranks.load(2, adapter("rank1"))
    for handle in (0, 2):
        with pytest.raises(ProtocolError, match="handle"):
            ranks.load(handle, adapter("rank1"))
    with pytest.raises(ProtocolError, match="not resident"):
        table.get(1)
