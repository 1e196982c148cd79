"""Experts in every form of codes are multiplied in one call, and as each of them would be alone."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from kvrun.nn.build import load_model
from kvrun.nn.grouped import GroupedLinear
from kvrun.quant import GroupedWeights
from kvrun.quant.coded import CodedLinear, Stacked
from kvrun.quant.codes import Codes
from kvrun_kernels import ops
from quantized import CONFIG, write_quantized
from test_quant import MADE
from tiny import oracle, randomise

STORED = ("gptq3", "gptq4", "gptq4_ordered", "gptq8_ordered", "awq_gemm", "fp8", "fp8_block")
BOUNDS = torch.tensor([0, 0, 5, 6, 40])
PROMPT = [5, 17, 99, 200, 3, 44, 7, 8, 120, 33]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("experts") / "plain"
    model = MixtralForCausalLM(MixtralConfig(**CONFIG, num_local_experts=4, num_experts_per_tok=2))
    randomise(model)
    model.save_pretrained(folder)
    return folder


def experts(folder: Path, monkeypatch, **arguments) -> list[tuple[GroupedWeights, list[CodedLinear]]]:
    """Every set of experts of a model, as it multiplies them and one by one."""
    found = []
    honest = GroupedLinear.__init__

    def noting(self, linears):
        honest(self, linears)
        found.append((self._weights, [linear.weight for linear in linears]))

    monkeypatch.setattr(GroupedLinear, "__init__", noting)
    load_model(folder, **arguments)
    monkeypatch.undo()
    return found


def refused(*arguments, **named):
    raise AssertionError("experts were multiplied one by one")


def check(grouped: GroupedWeights, alone: list, x: torch.Tensor, monkeypatch) -> None:
    """The same bits as one by one, in one call."""
    wanted = torch.cat([weight.matmul(x[start:stop]) for weight, (start, stop) in zip(alone, pairwise(BOUNDS)) if start < stop])
    monkeypatch.setattr(ops, "quantized_linear", refused)
    assert torch.equal(grouped.matmul(x, BOUNDS), wanted)
    monkeypatch.undo()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("quantize", MADE)
def test_experts_made_at_load_are_multiplied_in_one_call(quantize, dtype, plain, monkeypatch):
    activations = ("auto", "int8") if quantize in ("int4", "int8", "eetq") else ("auto",)
    for activation_dtype in activations:
        sets = experts(plain, monkeypatch, dtype="float32", quantize=quantize, activation_dtype=activation_dtype)
        assert len(sets) == 4
        for grouped, alone in sets:
            check(grouped, alone, torch.randn(40, alone[0].dense().shape[1]).to(dtype), monkeypatch)


@pytest.mark.parametrize("name", STORED)
def test_stored_experts_are_multiplied_in_one_call_and_answer_as_their_weights(name, plain, tmp_path, groups, monkeypatch):
    folder = write_quantized(name, plain, tmp_path / name)
    for grouped, alone in experts(folder, monkeypatch, dtype="float32"):
        check(grouped, alone, torch.randn(40, alone[0].dense().shape[1]), monkeypatch)
    for world in (1, 2):
        groups[world].load(folder)
        torch.testing.assert_close(groups[world].step([(0, PROMPT)]), oracle(folder / "oracle", [PROMPT])[0], rtol=1e-3, atol=1e-3)


def test_experts_of_several_forms_are_multiplied_one_by_one():
    def coded(group: int, order: torch.Tensor | None = None) -> CodedLinear:
        values = torch.randint(0, 16, (24, 32), dtype=torch.uint8)
        return CodedLinear(Codes(values, torch.rand(24, 32 // group), group=group, order=order), 32)

    order, x = torch.randperm(32), torch.randn(40, 32)
    stacked = Stacked([coded(8), coded(16)], [24, 24])
    for weights in ([coded(8), coded(16), coded(8), coded(8, order)], [stacked] * 4):
        biases = list(torch.randn(4, len(weights[0].dense())))
        found = GroupedWeights(weights, biases).matmul(x, BOUNDS)
        wanted = [weight.matmul(x[a:b], bias) for weight, bias, (a, b) in zip(weights, biases, pairwise(BOUNDS)) if a < b]
        assert torch.equal(found, torch.cat(wanted))
