"""Weights in every format on a GPU: unpacked and multiplied there, with the logits of the host and nothing left on it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters import ALL_LLAMA, write_adapter
from blocks import Kinds, served
from elsewhere import LAUNCHES, gpus, interpreting
from kvrun.device import Cuda
from kvrun.errors import Unsupported
from kvrun.nn.build import load_model
from kvrun.quant import CodedLinear
from kvrun.quant.coded import Stacked
from kvrun.quant.gguf import DECODERS
from kvrun_kernels.ops import PackedQuantized
from kvrun_kernels.quantized_linear.rows import QuantizedRows
from kvrun_kernels.quantized_linear.scaled import in_float8
from quantized import CONFIG, WRITERS, write_plain, write_quantized
from ragged import Runner
from test_quant import MADE
from tiny import CLOSE, distance, randomise

# Files hold each matrix in the next type from that number on. Queries, keys and values, one linear here, thus differ in form.
FILES = ("gguf 0", "gguf 5")
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd", "output.")
# Experts are multiplied in one call, those of the third after their inputs were arranged.
EXPERTS = ("experts gptq4", "experts fp8_block", "experts gptq4_ordered", "experts int4")
NAMES = (*WRITERS, *(f"made {name}" for name in MADE), *FILES, *EXPERTS)
ADAPTED = ("gptq4_ordered", "made int4", "gguf 0")
ASKED = [(0, [5, 17, 99, 200]), (1, [44])]


def in_turn(first: int) -> Kinds:
    kinds = list(DECODERS)
    return lambda name, shape: next((kinds[(first + at) % len(kinds)] for at, part in enumerate(MATRICES) if part in name), "F32")


def write_experts(folder: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**{**CONFIG, "num_hidden_layers": 1}, num_local_experts=3, num_experts_per_tok=2))
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A name -> the folder of its model, written once, what else to load it with, and a plain model of its shapes."""
    logging.disable(logging.WARNING)
    at, known = tmp_path_factory.mktemp("formats"), {}

    def source(kind: str) -> Path:
        if kind not in known:
            wide = {"hidden_size": 256, "intermediate_size": 256} if kind == "whole" else {}
            known[kind] = write_experts(at / kind) if kind == "experts" else write_plain(at / kind, num_hidden_layers=1, **wide)
        return known[kind]

    def folder(name: str) -> tuple[Path, dict[str, str], Path]:
        kind, _, encoding = name.rpartition(" ")
        plain = source({"gguf": "whole", "experts": "experts"}.get(kind, "plain"))
        if kind == "made" or encoding == "int4":
            return plain, {"quantize": encoding}, plain
        if name not in known:
            (own := at / name.replace(" ", "_")).mkdir()
            known[name] = served(plain, own, in_turn(int(encoding))) if kind == "gguf" else write_quantized(encoding, plain, own / "model")
        return known[name], {}, plain

    return folder


@pytest.fixture
def on_host(name, written) -> torch.Tensor:
    """The host's logits; ask for it before `gpu`."""
    folder, how, _ = written(name)
    runner = Runner()
    runner.load(folder, **how)
    return runner.step(ASKED)


@pytest.fixture
def adapted_on_host(name, written, tmp_path) -> tuple[Path, torch.Tensor]:
    """An adapter of a model, and the host's logits where the second sequence has it; ask for it before `gpu`."""
    folder, how, plain = written(name)
    adapter = write_adapter(tmp_path / "all", plain, r=8, lora_alpha=16, target_modules=ALL_LLAMA)
    runner = Runner()
    runner.load(folder, **how)
    runner.adapt(adapter, [1])
    return adapter, runner.step(ASKED)


def coded(weight: object) -> Iterator[PackedQuantized]:
    """What a linear has in codes."""
    if isinstance(weight, Stacked):
        for part in weight._parts:
            yield from coded(part)
    elif isinstance(weight, CodedLinear):
        yield weight.packed


@pytest.mark.parametrize("name", NAMES)
def test_logits_on_a_gpu_are_those_of_the_host(name, on_host, gpu, written):
    folder, how, _ = written(name)
    runner = Runner()
    runner.load(folder, device=gpu, **how)
    packed = [form for linear in runner.model.linears for form in coded(linear.weight)]
    assert packed and all(isinstance(form, QuantizedRows) for form in packed)
    assert {part.device for form in packed for part in form.parts if part is not None} == {gpu.place}
    logits = runner.step(ASKED)
    assert logits.device == gpu.place and ("_multiply" in LAUNCHES or not interpreting())
    assert distance(logits.cpu(), on_host) < CLOSE


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_over_codes_change_them_on_a_gpu_as_on_the_host(name, on_host, adapted_on_host, gpu, written):
    folder, how, _ = written(name)
    adapter, expected = adapted_on_host
    runner = Runner()
    runner.load(folder, device=gpu, **how)
    runner.adapt(adapter, [1])
    found = runner.step(ASKED).cpu()
    assert distance(found, expected) < CLOSE
    assert distance(found[:4], on_host[:4]) < CLOSE and distance(found[4:], on_host[4:]) > 0.1


@pytest.mark.parametrize("name", ["fp8", "float_quantized", "made fp8"])
def test_inputs_of_8_bit_floats_meet_weights_of_8_bit_floats_in_the_library_s_product(name, gpu, written, monkeypatch):
    folder, how, _ = written(name)
    exact = load_model(folder, dtype="bfloat16", device=gpu, **how)
    model = load_model(folder, dtype="bfloat16", device=gpu, activation_dtype="fp8", **how)
    assert (exact.activation_dtype, model.activation_dtype) == ("bfloat16", "fp8")
    assert (exact.kernels["quantized_linear"], model.kernels["quantized_linear"]) == ("triton", "torch, triton")
    product, calls = torch._scaled_mm, []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *given, **named: calls.append(given) or product(*given, **named))
    coded_ones = [linear for linear in model.linears if isinstance(linear.weight, CodedLinear)]
    for linear in coded_ones:
        x = torch.randn(5, linear.in_features).to(torch.bfloat16).to(gpu.place)
        codes, step = in_float8(x)
        weight = linear.weight.dense().double()
        wanted, unrounded = (codes.double() * step) @ weight.T, x.double() @ weight.T
        found = linear.weight.matmul(x).double()
        torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-3 * wanted.abs().max().item())
        assert 0 < ((found - unrounded).norm() / unrounded.norm()).item() < 0.04
    assert len(calls) == len(coded_ones) == 4


@pytest.mark.parametrize(("name", "how", "capability", "said"), [
    ("made fp8", {}, (8, 6), "--activation-dtype fp8 was asked for on cuda:0, which has no such product; auto is served"),
    ("made fp8", {}, (12, 0), "--activation-dtype fp8 was asked for on cuda:0"),
    ("made fp8", {"activation_dtype": "int8"}, (9, 0), "--activation-dtype int8 was asked for on cuda:0, .*; auto or fp8 is served"),
    ("made fp8", {"device": None}, (9, 0), "--activation-dtype fp8 was asked for on cpu, .*; auto or int8 is served"),
    ("made fp8", {"dtype": "float16"}, (8, 9), "rounds what is bfloat16, and the model computes in torch.float16; add --dtype bfloat16"),
    ("made fp8", {"quantize": None}, (8, 9), "a scale for each output, and nothing is quantized; leave it out, or add --quantize fp8"),
])  # fmt: skip
def test_inputs_of_8_bit_floats_are_refused_where_nothing_multiplies_them(name, how, capability, said, written):
    folder, made, _ = written(name)
    asked = {"dtype": "bfloat16", "activation_dtype": "fp8", "device": Cuda(0), **made, **how}
    with gpus(capability=capability), pytest.raises(Unsupported, match=said):
        load_model(folder, **asked)


@pytest.mark.parametrize("name", ["fp8_block", "made int4"])
def test_inputs_of_8_bit_floats_are_refused_for_other_codes(name, gpu, written):
    folder, how, _ = written(name)
    with pytest.raises(Unsupported, match=f"and the codes of {'fp8' if name == 'fp8_block' else 'int4'} are none; leave it out"):
        load_model(folder, dtype="bfloat16", device=gpu, activation_dtype="fp8", **how)
