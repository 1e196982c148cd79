"""Experts stored as mxfp4 are multiplied as transformers takes them apart, at any number of ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from kvrun.nn.build import load_model
from kvrun.quant.mxfp4 import MxFp4
from kvrun.weights.plan import Cut
from ragged import Runner
from safetensors.torch import load_file, save_file
from test_parity import prompts
from tiny import CLOSE, distance, oracle

NAMES = ("gate_up_proj", "down_proj")
# Of the codes: the first of the hundreds with which transformers' own logits in float32 are settled, as `draws.py` means it.
FIRST_SEED = 700


def random_codes(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and exponents of matrices [..., out, in], of about the size of plain random weights."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(123, 127, (*shape[:-1], shape[-1] // 32), generator=generator, dtype=torch.uint8)


def apart(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What transformers makes of them: [experts, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)


def test_codes_stand_for_what_transformers_makes_of_them():
    blocks, scales = random_codes((3, 8, 64))
    theirs = apart(blocks, scales)
    for expert in range(3):
        cut = Cut("w", ((0, 8),), ((0, 64),), 8, 64, True, (expert, 3))
        codes = MxFp4().decode({"blocks": blocks[expert], "scales": scales[expert]}, cut)
        ours = codes.table[codes.values.long()] * codes.scales.repeat_interleave(32, 1)
        assert torch.equal(ours.T, theirs[expert])


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    """gpt-oss with experts as published, and the same with the numbers that they stand for."""
    published, plain = (
        Path(shutil.copytree(checkpoint("gpt_oss"), tmp_path_factory.mktemp("mxfp4") / name)) for name in ("coded", "plain")
    )
    tensors = load_file(plain / "model.safetensors")
    coded = dict(tensors)
    for seed, name in enumerate((name for name in tensors if name.endswith(NAMES)), FIRST_SEED):
        experts, inputs, outputs = tensors[name].shape
        blocks, scales = random_codes((experts, outputs, inputs), seed)
        tensors[name] = apart(blocks, scales).contiguous()
        coded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del coded[name]
    save_file(tensors, plain / "model.safetensors")
    save_file(coded, published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (published / "config.json").write_text(json.dumps(config))
    return published, plain


@pytest.mark.parametrize("world", [1, 2, 3])
def test_logits_equal_transformers_over_the_numbers_they_stand_for(world, folders, groups):
    published, plain = folders
    groups[world].load(published)
    logits = groups[world].step(list(enumerate(prompts())))
    assert distance(logits, torch.cat(oracle(plain, prompts()))) < CLOSE


def test_codes_are_held_as_codes(folders):
    published, plain = folders
    coded, dense = (load_model(folder, dtype="float32") for folder in (published, plain))
    assert {type(linear.weight).__name__ for linear in coded.linears} == {"CodedLinear", "DenseLinear"}
    assert {type(linear.weight).__name__ for linear in dense.linears} == {"DenseLinear"}


@pytest.fixture
def on_host(folders) -> torch.Tensor:
    """The host's logits; ask for it before `gpu`."""
    runner = Runner()
    runner.load(folders[0])
    return runner.step([(0, [5, 17, 99])])


def test_codes_are_multiplied_on_a_gpu_as_on_the_host(folders, on_host, gpu):
    runner = Runner()
    runner.load(folders[0], device=gpu)
    logits = runner.step([(0, [5, 17, 99])])
    assert logits.device == gpu.place and distance(logits.cpu(), on_host) < CLOSE
