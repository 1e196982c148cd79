"""Mixtures of experts and latent attention beyond their logits: adapters in every form, routing, and what is refused."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from adapters import edit_config, edit_tensors, peft_logits, write_adapter
from kvrun import models
from kvrun.errors import AdapterError, FilesError, Unsupported
from kvrun.lora.adapter import read_adapter, targets
from kvrun.nn.build import load_model
from kvrun.nn.grouped import sorted_by
from kvrun.nn.routing import route_of
from kvrun.spec import (
    Config,
    Gated,
    GroupedSoftmax,
    LatentAttention,
    Moe,
    PlainGroupedSigmoid,
    SoftmaxTopK,
    SparseMixer,
    TopKSoftmax,
    model_of,
)
from ragged import Runner
from safetensors.torch import load_file, save_file
from test_parity import attentions, mutated, prompts
from tiny import CLOSE, distance, oracle, write_checkpoint

LENGTHS = (1, 7, 20)
PREFIXES = (1, 2, 7, 20)  # of the prompts for which the rows' own weights were drawn
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PARAMETERS = {
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": [*BOTH, "mlp.gate.weight"]},
    "mixtral_windowed": {"target_modules": [], "target_parameters": BOTH[1:]},
    "qwen2_moe": {"target_modules": ["shared_expert_gate", "shared_expert.up_proj"], "target_parameters": [*BOTH, "mlp.gate.weight"]},
    "gpt_oss": {"target_modules": ["k_proj", "o_proj"], "target_parameters": [*BOTH, "router.weight"]},
    "granite_moe": {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj", "router.weight"]},
    "phimoe": {"target_modules": [], "target_parameters": [BOTH[0], "mlp.router.weight"]},
    "deepseek_v2": {"target_modules": ["q_a_proj", "q_b_proj", "kv_b_proj"], "target_parameters": BOTH},
    "deepseek_v3": {"target_modules": ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], "target_parameters": ["mlp.gate.weight"]},
}
# Of adapters of ranks 3 and 8, chosen as the rows' own are, by what peft computes (`draws.py`); those not named have none but zeros.
SEEDS = {
    "mixtral": (0, 1),
    "mixtral_windowed": (0, 1),
    "gpt_oss": (1, 0),
    "granite_moe": (2, 0),
    "deepseek_v2": (3, 0),
    "deepseek_v3": (0, 7),
}


def experts_adapters(row: str, checkpoint: Path, folder: Path) -> list[Path]:
    """Adapters of ranks 3 and 8 for the row's experts."""
    chosen = zip((3, 8), SEEDS.get(row, (0, 0)), strict=True)
    return [write_adapter(folder / f"rank{r}", checkpoint, seed=seed, r=r, lora_alpha=5, **PARAMETERS[row]) for r, seed in chosen]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", PARAMETERS)
def test_adapters_of_all_experts_at_once_answer_as_peft_s_beside_others_and_none(row, world, groups, checkpoint, tmp_path):
    folder, asked, runner = checkpoint(row), prompts(lengths=PREFIXES), groups[world]
    runner.load(folder)
    adapters = experts_adapters(row, folder, tmp_path)
    for number, adapter in enumerate(adapters):
        runner.adapt(adapter, [100 * (number + 1) + n for n in range(len(asked))])
    rows = [(first + n, ids) for n, ids in enumerate(asked) for first in (0, 100, 200)]
    pieces = runner.step(rows).split([len(ids) for _, ids in rows])
    plain, *adapted = (torch.cat(pieces[first::3]) for first in range(3))
    assert distance(plain, torch.cat(oracle(folder, asked))) < CLOSE
    for found, adapter in zip(adapted, adapters, strict=True):
        assert distance(found, torch.cat(peft_logits(folder, adapter, asked))) < CLOSE
        assert distance(found, plain) > 0.1, "the adapter changes too little to prove anything"


def test_expert_modules_of_older_adapters_mean_the_same(groups, checkpoint, tmp_path):
    folder, asked = checkpoint("mixtral"), prompts(seed=3, lengths=LENGTHS)
    stacked = write_adapter(tmp_path / "new", folder, r=2, lora_alpha=6, target_modules=["w1", "w2", "w3", "gate"])
    stated = json.loads((stacked / "adapter_config.json").read_text())
    patterns = {"rank_pattern": {"w1": 4, "w3": 4}, "alpha_pattern": {"w1": 12, "w3": 12}}
    older = tmp_path / "old"
    older.mkdir()
    (older / "adapter_config.json").write_text(json.dumps({**stated, "target_parameters": None, **patterns}))
    save_file(_apart(load_file(stacked / "adapter_model.safetensors"), 4), older / "adapter_model.safetensors")
    runner = groups[1]
    runner.load(folder)
    runner.adapt(older, [0, 1, 2])
    assert distance(runner.step(list(enumerate(asked))), torch.cat(peft_logits(folder, stacked, asked))) < CLOSE


def _apart(tensors: dict, experts: int) -> dict:
    """PEFT's tensors for all experts as those of a module for each, as it saved them before."""
    found = {}
    for name, a in tensors.items():
        if not name.endswith("lora_A.weight"):
            continue
        b, module = tensors[name.replace("lora_A", "lora_B")], name.removesuffix(".lora_A.weight")
        block = module.replace(".mlp.", ".block_sparse_moe.")
        if module.endswith(".gate"):
            found |= {f"{block}.lora_A.weight": a, f"{block}.lora_B.weight": b}
            continue
        rank = len(a) // experts
        for expert, mine in enumerate(a.split(rank)):
            made = b.view(-1, rank, experts)[..., expert]
            names = ("w1", "w3") if module.endswith("base_layer") else ("w2",)
            for part, rows in zip(names, made.chunk(len(names))):
                at = f"{block.removesuffix('.base_layer')}.{expert}.{part}"
                found |= {f"{at}.lora_A.weight": mine.clone(), f"{at}.lora_B.weight": rows.clone()}
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_an_adapter_of_experts_that_lie_below_each_other_equals_the_weights_it_would_make(world, groups, checkpoint, tmp_path):
    folder, asked = checkpoint("dbrx"), prompts(seed=3, lengths=LENGTHS)
    weights, pairs = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    names = ("w1", "v1", "w2")
    for at in (f"transformer.blocks.{layer}.ffn.experts.mlp" for layer in range(2)):
        for depth, name in enumerate(reversed(names)):  # the last one wraps the others
            rows, width = weights[f"{at}.{name}"].shape
            a, b = torch.randn(2, width, generator=generator) * 0.3, torch.randn(rows, 2, generator=generator) * 0.3
            owner = at + ".base_layer" * depth
            pairs |= {f"base_model.model.{owner}.lora_A.weight": a, f"base_model.model.{owner}.lora_B.weight": b}
            weights[f"{at}.{name}"] += b @ a
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    for made in (adapter, merged):
        made.mkdir()
    save_file(pairs, adapter / "adapter_model.safetensors")
    changed = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": [f"experts.mlp.{name}" for name in names]}
    (adapter / "adapter_config.json").write_text(json.dumps(changed))
    save_file(weights, merged / "model.safetensors")
    (merged / "config.json").write_text((folder / "config.json").read_text())
    runner = groups[world]
    runner.load(folder)
    runner.adapt(adapter, [0, 1, 2])
    adapted = runner.step(list(enumerate(asked)))
    runner.load(merged)
    assert distance(adapted, runner.step(list(enumerate(asked)))) < CLOSE


@pytest.fixture
def experts_adapter(checkpoint, tmp_path):
    return write_adapter(tmp_path / "adapter", checkpoint("mixtral"), r=2, lora_alpha=2, target_modules=[], target_parameters=BOTH)


def test_the_experts_of_an_adapter_share_one_a(checkpoint, experts_adapter):
    model = load_model(checkpoint("mixtral"), dtype="float32")
    adapter = read_adapter(experts_adapter, model.linears, model.dtype)
    per_layer = 2 * 4 * (64 + 2 * 96) + 2 * 4 * (96 + 64)  # rank times experts times (inputs and outputs), twice
    assert adapter.bytes == 4 * 2 * per_layer and adapter.matched == 8
    assert {"w1", "w2", "w3", "gate", "gate_up_proj", "down_proj"} <= set(targets(model.linears))


def test_a_parameter_that_the_config_does_not_name_is_refused_by_name(checkpoint, experts_adapter):
    edit_config(experts_adapter, target_parameters=BOTH[:1])
    with pytest.raises(AdapterError, match=r"experts\.base_layer\.lora_A"):
        read_adapter(experts_adapter, load_model(checkpoint("mixtral"), dtype="float32").linears, torch.float32)


def test_a_change_of_fewer_experts_than_there_are_is_refused(checkpoint, experts_adapter):
    def shorten(tensors: dict) -> None:
        for name in [name for name in tensors if "lora_A" in name]:
            tensors[name] = tensors[name][:6]

    edit_tensors(experts_adapter, shorten)
    with pytest.raises(AdapterError, match=r"gate_up_proj\.lora_A is float32 \[6, 64\], not \[8, 64\]"):
        read_adapter(experts_adapter, load_model(checkpoint("mixtral"), dtype="float32").linears, torch.float32)


def test_rows_are_ordered_by_expert_and_within_one_by_token():
    choice = torch.tensor([[2, 0], [1, 2], [2, 1], [2, 0]])
    groups, places = sorted_by(choice, 4)
    assert groups.offsets.tolist() == [0, 2, 4, 8, 8]
    assert groups.tokens.tolist() == [0, 3, 1, 2, 0, 1, 2, 3]
    assert places.tolist() == [[4, 0], [2, 5], [6, 3], [7, 1]]


def test_routers_choose_and_weigh_as_their_rules_say():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.5]])
    shares = logits.softmax(-1)[0]
    choice, weights = route_of(SoftmaxTopK(2, 2.0), None)(logits)
    assert choice.tolist() == [[1, 3]] and torch.allclose(weights[0], 2 * shares[[1, 3]])
    choice, weights = route_of(TopKSoftmax(2), None)(logits)
    assert choice.tolist() == [[1, 3]] and torch.allclose(weights[0], shares[[1, 3]] / shares[[1, 3]].sum())
    choice, _ = route_of(GroupedSoftmax(2, groups=2, top_groups=1), None)(torch.tensor([[1.0, 3.0, 2.9, 2.8]]))
    assert sorted(choice[0].tolist()) == [0, 1], "the second best lies in the other group"
    choice, weights = route_of(SparseMixer(0.0), None)(logits)
    assert choice.tolist() == [[1, 3]] and torch.allclose(weights, torch.ones(1, 2)), "nothing else is near"


def test_layers_that_only_guess_ahead_are_left_unread(tmp_path):
    folder = write_checkpoint("deepseek_v3", tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.2.eh_proj.weight": torch.zeros(4, 4)}, file)
    load_model(folder, dtype="float32")
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(FilesError, match=r"layers\.3\.eh_proj"):
        load_model(folder, dtype="float32")


def _config(folder: Path, **fields: object) -> Config:
    return Config({**json.loads((folder / "config.json").read_text()), **fields})


def test_what_no_released_model_needs_is_refused(checkpoint):
    with pytest.raises(Unsupported, match="moe_normalize_expert_weights 2"):
        model_of(_config(checkpoint("dbrx"), ffn_config={"moe_normalize_expert_weights": 2}))


def test_a_page_of_latents_is_as_large_on_every_rank(groups, checkpoint):
    for world in (1, 2):
        groups[world].load(checkpoint("deepseek_v3"))
    whole, half = groups[1]._runner.model, groups[2]._runner.model
    assert half.page_bytes() == whole.page_bytes() == 2 * (32 + 8) * 16 * 4  # layers, latent and rotated key, tokens, bytes
    assert half.weight_bytes < 0.7 * whole.weight_bytes


def of_kind(kind, change):
    """The model with every mixer of a kind changed."""
    return lambda model: mutated(model, lambda mixer: change(mixer) if isinstance(mixer, kind) else mixer)


def turned(style):
    """The model with latents rotated in another style."""
    return of_kind(LatentAttention, lambda a: replace(a, position=replace(a.position, style=style)))


def routed(change):
    """The model with another router."""
    return of_kind(Moe, lambda moe: replace(moe, router=change(moe.router)))


def plain_weights(router):
    return PlainGroupedSigmoid(*(getattr(router, field.name) for field in fields(router)))


MUTATIONS = {
    "expert weights as the softmax gives them": ("mixtral", routed(lambda r: SoftmaxTopK(r.top))),
    "expert weights as DBRX has none": ("dbrx", routed(lambda r: SoftmaxTopK(r.top))),
    "expert weights made to sum to 1": ("qwen2_moe", routed(lambda r: TopKSoftmax(r.top))),
    "expert weights made to sum to 1 by sigmoids": ("deepseek_v3", routed(plain_weights)),
    "expert weights not scaled": ("deepseek_v2_lite", routed(lambda r: replace(r, scale=1.0))),
    "shares of all in place of each": ("glm4_moe", routed(lambda r: GroupedSoftmax(r.top, r.groups, r.top_groups, r.scale))),
    "experts of every group": ("deepseek_v2", routed(lambda r: replace(r, top_groups=r.groups))),
    "experts of every group of V3": ("deepseek_v3_half", routed(lambda r: replace(r, top_groups=r.groups))),
    "experts from a wider field": ("phimoe", routed(lambda r: SparseMixer(2 * r.jitter))),
    "one expert fewer": ("olmoe", routed(lambda r: replace(r, top=1))),
    "a shared part without its gate": ("qwen2_moe", of_kind(Gated, lambda g: g.part)),
    "a shared part less": ("deepseek_v3", lambda m: mutated(m, lambda x: replace(x, act="relu") if getattr(x, "width", 0) == 48 else x)),
    "gate and up swapped": ("mixtral", of_kind(Moe, lambda m: replace(m, layout=replace(m.layout, gate=m.layout.up, up=m.layout.gate)))),
    "gate and up swapped below each other": (
        "dbrx",
        of_kind(Moe, lambda m: replace(m, layout=replace(m.layout, gate=m.layout.up, up=m.layout.gate))),
    ),
    "gate above up": ("gpt_oss", of_kind(Moe, lambda m: replace(m, layout=replace(m.layout, order="halves")))),
    "gate and up alternating": ("granite_moe", of_kind(Moe, lambda m: replace(m, layout=replace(m.layout, order="alternating")))),
    "experts without biases": ("gpt_oss", of_kind(Moe, lambda m: replace(m, layout=replace(m.layout, bias=False)))),
    "a wider clamp": ("gpt_oss", of_kind(Moe, lambda m: replace(m, act=replace(m.act, limit=9.0)))),
    "a steeper gate": ("gpt_oss", of_kind(Moe, lambda m: replace(m, act=replace(m.act, alpha=1.8)))),
    "no sinks": ("gpt_oss", attentions(lambda a: replace(a, sinks=None))),
    "rotations cut to whole numbers": (
        "gpt_oss",
        attentions(lambda a: replace(a, position=replace(a.position, scaling=replace(a.position.scaling, truncate=True)))),
    ),
    "nothing clipped": ("dbrx", attentions(lambda a: replace(a, clip=None))),
    "scores of an unstretched context": ("deepseek_v3", of_kind(LatentAttention, lambda a: replace(a, scale=24**-0.5))),
    "latents rotated in halves": ("deepseek_v3", turned("half")),
    "latents rotated as neighbours": ("deepseek_v3_half", turned("interleaved")),
    "latents normalised with the layers' epsilon": (
        "deepseek_v2",
        of_kind(LatentAttention, lambda a: replace(a, norm=replace(a.norm, eps=1e-2))),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees(mutation, checkpoint, monkeypatch):
    row, change = MUTATIONS[mutation]
    honest = models.read
    # What a mutation no longer reads would be seen by the loader, which is not what is asked here.
    monkeypatch.setattr(models, "read", lambda folder: (honest(folder)[0], replace(change(honest(folder)[1]), leftovers=("",))))
    runner = Runner()
    runner.load(checkpoint(row))
    assert distance(runner.step(list(enumerate(prompts()))), torch.cat(oracle(checkpoint(row), prompts()))) > CLOSE
