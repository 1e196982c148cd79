"""Weights in every format stand for what their package says they do, on any rank, and adapters go on top of them."""

import json
import logging
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from adapters import ALL_LLAMA, likeliest, write_adapter
from driver import answers
from kvrun.dist import Group
from kvrun.errors import AdapterError, FilesError, Unsupported
from kvrun.inspect import inspect_model
from kvrun.nn.build import load_model
from kvrun.nn.linear import Linear
from kvrun.nn.loaded import LoadedModel
from kvrun.quant import DenseLinear
from kvrun.quant.bits import unpack
from kvrun.quant.coded import CodedLinear, Stacked, build
from kvrun.quant.codes import Codes, grouped
from kvrun.quant.registry import UNREAD, choose
from quantized import SINGLE, WRITERS, pack, write_oracle, write_plain, write_quantized
from safetensors.torch import load_file, save_file
from tiny import oracle

MADE = ("int8", "int4", "eetq", "fp8", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4")
# The package multiplies by the scale and then by 1/127; one scale holds both, so a float32 may differ in its last bit.
ROUNDED_TWICE = ("bnb_int8",)
# The package computes what these stand for in bfloat16.
IN_BFLOAT16 = ("nvfp4",)
PROMPT = [5, 17, 99, 200, 3, 44, 7, 8, 120, 33]
ALL = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LLAMA}


class Alone(Group):
    """One rank of a group that is never asked to talk."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    logging.disable(logging.WARNING)
    return write_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """name in WRITERS -> its folder, written once."""
    at, written = tmp_path_factory.mktemp("quantized"), {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = write_quantized(name, plain, at / name)
        return written[name]

    return folder


@pytest.fixture(scope="module")
def changes(plain, tmp_path_factory) -> Path:
    """An adapter of every linear of the model."""
    return write_adapter(tmp_path_factory.mktemp("adapters") / "all", plain, **ALL)


def inner(model: LoadedModel) -> list[Linear]:
    """The linears of the layers."""
    return [linear for linear in model.linears if linear.sources[0].module != "lm_head"]


def expected(linear: Linear, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What plain tensors say that a rank's linear is."""
    parts = [tensors[f"{source.module}.weight"][source.rows] for source in linear.sources]
    return torch.cat([part if s.cols is None else part[:, s.cols] for part, s in zip(parts, linear.sources, strict=True)])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_weights_are_to_the_bit_what_the_package_reads_and_multiply_as_such(name, world, quantized):
    folder = quantized(name)
    tensors = load_file(folder / "oracle" / SINGLE)
    for rank in range(world):
        model = load_model(folder, dtype="float32", group=Alone(rank, world))
        assert {type(linear.weight) for linear in inner(model)} <= {CodedLinear, Stacked}
        for linear in inner(model):
            found, wanted = linear.weight.dense(), expected(linear, tensors)
            if name in IN_BFLOAT16:
                torch.testing.assert_close(found, wanted, rtol=2**-8, atol=0)
            elif name in ROUNDED_TWICE:
                torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)
            else:
                assert torch.equal(found, wanted), linear.sources[0].module
        for linear in inner(model)[:4]:  # each role
            for dtype, room in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
                x, bias = torch.randn(5, linear.in_features).to(dtype), torch.randn(linear.out_features).to(dtype)
                wanted = x.double() @ linear.weight.dense().double().T + bias.double()
                size = wanted.abs().max().item()
                torch.testing.assert_close(linear.weight.matmul(x, bias).double(), wanted, rtol=room, atol=room * size)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ["gptq4_ordered", "awq_gemm", "packed4_asymmetric", "fp8_block", "bnb_nf4_double"])
def test_the_model_computes_what_the_plain_one_of_the_same_weights_computes(name, world, quantized, groups):
    folder = quantized(name)
    groups[world].load(folder)
    torch.testing.assert_close(groups[world].step([(0, PROMPT)]), oracle(folder, [PROMPT])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", WRITERS)
def test_adapters_over_a_format_answer_as_those_of_peft_over_its_weights(name, quantized, changes, tmp_path):
    folder = quantized(name)
    base, adapted = answers(folder, PROMPT, tmp_path, adapter=changes, world=2 if "4" in name else 1)
    assert [adapted] == likeliest(folder, changes, [(PROMPT, adapted)])
    assert [base] == likeliest(folder, None, [(PROMPT, base)])
    assert adapted != base


@pytest.mark.parametrize("quantize", MADE)
def test_formats_made_at_load_answer_as_the_weights_they_stand_for(quantize, plain, changes, tmp_path):
    model = load_model(plain, dtype="float32", quantize=quantize)
    weights, tensors = {}, load_file(plain / SINGLE)
    for linear in model.linears:
        for source, (start, stop) in zip(linear.sources, pairwise([s.column for s in linear.sources] + [linear.out_features]), strict=True):
            weights[source.module] = linear.weight.dense()[start:stop]
            original = tensors[f"{source.module}.weight"]
            lost = ((weights[source.module] - original).norm() / original.norm()).item()
            assert lost < (0.03 if quantize in ("int8", "eetq", "bitsandbytes", "fp8") else 0.13)
    folder = tmp_path / "made"
    folder.mkdir()
    write_oracle(plain, folder, weights)
    base, adapted = answers(plain, PROMPT, tmp_path, adapter=changes, quantize=quantize)
    assert [adapted] == likeliest(folder, changes, [(PROMPT, adapted)])
    assert [base] == likeliest(folder, None, [(PROMPT, base)])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_activations_of_8_bits_stay_near_the_exact_ones(quantize, plain):
    exact, rounded = (load_model(plain, dtype="float32", quantize=quantize, activation_dtype=dtype) for dtype in ("auto", "int8"))
    assert (exact.activation_dtype, rounded.activation_dtype) == ("float32", "int8")
    for one, other in zip(inner(exact), inner(rounded), strict=True):
        assert torch.equal(one.weight.dense(), other.weight.dense())
        x = torch.randn(64, one.in_features)
        wanted, found = one.weight.matmul(x), other.weight.matmul(x)
        assert 0 < ((found - wanted).norm() / wanted.norm()).item() < 0.012


@pytest.mark.parametrize(
    "name,quantize,said",
    [
        (None, None, "and nothing is quantized; leave it out, or add --quantize int8"),
        (None, "fp8", "and the codes of fp8 are none"),
        ("bnb_nf4", None, "and the codes of bitsandbytes are none"),
    ],
)
def test_activations_of_8_bits_without_integer_codes_are_refused(name, quantize, said, plain, quantized):
    with pytest.raises(Unsupported, match=f"--activation-dtype int8 rounds what is multiplied with integer codes, {said}"):
        load_model(plain if name is None else quantized(name), quantize=quantize, activation_dtype="int8")


@pytest.mark.parametrize("name", ["gptq3", "gptq4_ordered", "awq_gemv", "packed4_asymmetric", "nvfp4", "fp8_block", "bnb_nf4_double"])
def test_parameters_are_those_of_the_plain_model_however_they_are_stored(name, plain, quantized):
    count = sum(tensor.numel() for tensor in load_file(plain / SINGLE).values())
    assert load_model(quantized(name)).parameters == inspect_model(quantized(name)).parameters == count


def test_biases_of_zeros_beside_codes_are_left_out_and_others_are_not(quantized, tmp_path, caplog):
    folder = tmp_path / "biased"
    shutil.copytree(quantized("gptq4"), folder)
    tensors, name = load_file(folder / SINGLE), "model.layers.1.mlp.up_proj.bias"
    tensors[name] = torch.zeros(192, dtype=torch.float16)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    logging.disable(logging.NOTSET)
    with caplog.at_level("INFO", "kvrun"):
        model = load_model(folder, dtype="float32")
    assert f"1 tensor ({name})" in caplog.text
    for one, other in zip(model.linears, load_model(quantized("gptq4"), dtype="float32").linears, strict=True):
        assert one.bias is None and torch.equal(one.weight.dense(), other.weight.dense())
    tensors[name][7] = 2**-14
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(FilesError, match="that nobody would read"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_tables_made_at_load_are_those_of_bitsandbytes(kind, plain):
    import bitsandbytes.functional as bnb

    tensors = load_file(plain / SINGLE)
    for linear in inner(load_model(plain, dtype="float32", quantize=f"bitsandbytes-{kind}")):
        wanted = [
            bnb.dequantize_4bit(*bnb.quantize_4bit(tensors[f"{s.module}.weight"], blocksize=64, quant_type=kind)) for s in linear.sources
        ]
        assert torch.equal(linear.weight.dense(), torch.cat(wanted))


@pytest.mark.parametrize("quantize", ["int8", "bitsandbytes"])
def test_one_scale_for_each_output_reaches_its_largest_weight(quantize, plain):
    tensors = load_file(plain / SINGLE)
    for linear in inner(load_model(plain, dtype="float32", quantize=quantize)):
        assert torch.equal(linear.weight.dense(), int8(expected(linear, tensors)))


def int8(weight: torch.Tensor) -> torch.Tensor:
    """What int8 codes stand for that reach the largest weight of each output."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("quantize", MADE)
@pytest.mark.parametrize("row", ["llama", "llama_tied", "baichuan2_13b"])
def test_the_head_is_int8_in_kv_run_s_own_formats_and_the_embedding_plain_in_all(row, quantize, world, checkpoint):
    tensors = load_file(checkpoint(row) / SINGLE)
    embedding = tensors["model.embed_tokens.weight"]
    rows = embedding if row == "llama_tied" else tensors["lm_head.weight"]
    coded = quantize in ("int8", "int4")
    wanted = int8(rows) if coded else rows
    if row == "baichuan2_13b":
        wanted = torch.nn.functional.normalize(wanted)
    for rank in range(world):
        model = load_model(checkpoint(row), dtype="float32", quantize=quantize, group=Alone(rank, world))
        head = model.decoder.head.weight
        assert isinstance(head.weight, CodedLinear if coded else DenseLinear)
        torch.testing.assert_close(head.weight.dense(), wanted[head.sources[0].rows], rtol=1e-6 if row == "baichuan2_13b" else 0, atol=0)
        first, end = model.decoder.embed.held
        assert torch.equal(model.decoder.embed.rows(torch.arange(end - first)), embedding[first:end])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("row", ["llama", "llama_tied"])
def test_a_head_in_codes_is_counted_beside_a_plain_embedding(row, quantize, checkpoint):
    model, tensors = load_model(checkpoint(row), dtype="float32", quantize=quantize), load_file(checkpoint(row) / SINGLE)
    plain = sum(tensor.nbytes for name, tensor in tensors.items() if "embed" in name or "norm" in name)
    assert model.weight_bytes == plain + sum(linear.weight.nbytes for linear in model.linears)
    assert inspect_model(checkpoint(row), "float32", quantize=quantize).rank_weight_bytes == pytest.approx(model.weight_bytes, rel=0.05)


def test_a_head_in_two_tensors_stays_plain(checkpoint):
    model = load_model(checkpoint("idefics"), dtype="float32", quantize="int4")
    assert isinstance(model.decoder.head.weight.weight, DenseLinear)
    assert inspect_model(checkpoint("idefics"), "float32", quantize="int4").rank_weight_bytes == pytest.approx(model.weight_bytes, rel=0.05)


@pytest.mark.parametrize("quantize", [None, "int4", "int8"])
def test_adapters_that_bring_copies_of_the_published_ends_are_taken_over_codes_of_them(quantize, plain, tmp_path):
    changes = write_adapter(tmp_path / "ends", plain, r=8, lora_alpha=16, target_modules=["q_proj", "lm_head", "embed_tokens"])
    file = changes / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = [name for name in tensors if name.endswith("base_layer.weight")]
    assert len(copies) == 2
    base, adapted = answers(plain, PROMPT, tmp_path, adapter=changes, quantize=quantize)
    bare = tmp_path / "bare"
    shutil.copytree(changes, bare)
    save_file({name: tensor for name, tensor in tensors.items() if name not in copies}, bare / file.name)
    assert answers(plain, PROMPT, tmp_path, adapter=bare, quantize=quantize) == [base, adapted] and adapted != base
    head = next(name for name in copies if "lm_head" in name)
    tensors[head][7, 5] += tensors[head][7].abs().max() / 100
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"lm_head\.base_layer\.weight is not the base model's"):
        answers(plain, PROMPT, tmp_path, adapter=changes, quantize=quantize)


@pytest.mark.parametrize("quantize,world", [("int4", 2), ("int4", 3), ("eetq", 2), ("eetq", 3), ("bitsandbytes-nf4", 2)])
def test_ranks_make_the_codes_that_one_rank_makes(quantize, world, plain):
    """Where each group lies in one rank; scales of whole outputs are a rank's own where inputs are cut."""
    whole = {linear.sources[0].module: linear for linear in inner(load_model(plain, dtype="float32", quantize=quantize))}
    for rank in range(world):
        for linear in inner(load_model(plain, dtype="float32", quantize=quantize, group=Alone(rank, world))):
            if linear.role == "row" and quantize == "eetq":
                continue
            alone, first = whole[linear.sources[0].module], linear.sources[0]
            wanted = alone.weight.dense()[first.rows]
            wanted = wanted if first.cols is None else wanted[:, first.cols]
            assert torch.equal(linear.weight.dense()[: len(first.rows)], wanted), (first.module, rank)


def test_what_every_rank_holds_whole_stays_plain_and_experts_do_not(checkpoint):
    model = load_model(checkpoint("mixtral"), dtype="float32", quantize="int4")
    routers = [linear for linear in model.linears if linear.role == "whole"]
    assert routers and all(isinstance(linear.weight, DenseLinear) for linear in routers)
    assert sum(isinstance(linear.weight, CodedLinear) for linear in model.linears) > len(routers)


def test_what_the_checkpoint_says_and_what_is_asked_must_agree(quantized, plain):
    folder = quantized("gptq4")
    assert isinstance(inner(load_model(folder, quantize="gptq"))[0].weight, CodedLinear)
    with pytest.raises(Unsupported, match="--quantize awq was asked for and the checkpoint is quantized with gptq; leave the flag out"):
        load_model(folder, quantize="awq")
    with pytest.raises(Unsupported, match=r"--quantize gptq reads weights stored so, and config.json has no quantization_config"):
        load_model(plain, quantize="gptq")
    with pytest.raises(Unsupported, match=r"--quantize int3 is not known; known are awq, bitsandbytes,"):
        load_model(plain, quantize="int3")


@pytest.mark.parametrize("name", ["gptq2", "gptq4", "gptq8", "awq_gemm", "packed8", "fp8_block", "bnb_nf4"])
def test_what_a_checkpoint_will_take_is_known_from_its_headers(name, quantized):
    folder = quantized(name)
    model = load_model(folder, dtype="float32")
    assert model.quantize == json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    assert inspect_model(folder, "float32").rank_weight_bytes == pytest.approx(model.weight_bytes, rel=0.05)


@pytest.mark.parametrize("quantize", MADE)
def test_what_a_format_made_at_load_will_take_is_known_from_headers(quantize, plain):
    model = load_model(plain, dtype="float32", quantize=quantize)
    assert model.quantize == quantize and model.weight_bytes < load_model(plain, dtype="float32").weight_bytes / 1.8
    assert inspect_model(plain, "float32", quantize=quantize).rank_weight_bytes == pytest.approx(model.weight_bytes, rel=0.05)


@pytest.mark.parametrize("method", UNREAD)
def test_formats_without_a_kernel_are_refused_by_name(method):
    with pytest.raises(Unsupported, match=f"--quantize {method} is not served: it stores {UNREAD[method]}"):
        choose(method, None)
    with pytest.raises(Unsupported, match=f"quantized with {method}, which is not served"):
        choose(None, {"quant_method": method})


@pytest.mark.parametrize(
    "config,said",
    [
        ({"quant_method": "gptq", "bits": 5}, "gptq with 5 bits is not read"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "in the layout marlin are not read"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "in the layout gemv_fast are not read"),
        ({"quant_method": "awq", "bits": 8}, "awq with 8 bits is not read"),
        ({"config_groups": {"a": {"format": "marlin-24"}}}, "in the layout marlin-24 are not read"),
        ({"quant_method": "mystery"}, "quantized with mystery, which is not read; known are awq"),
    ],
)
def test_variants_that_are_not_read_are_refused_by_name(config, said):
    with pytest.raises(Unsupported, match=said):
        choose(None, config)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_come_out_as_they_were_packed(bits):
    fields = torch.randint(0, 1 << bits, (64, 5), dtype=torch.uint8)
    assert torch.equal(unpack(pack(fields, bits, 0), bits, 0), fields)
    assert torch.equal(unpack(pack(fields.T, bits, 1), bits, 1), fields.T)


@pytest.mark.parametrize("groups", [[0] * 8 + [1] * 8, [3] * 4 + [5] * 16 + [6] * 4, [1, 0] * 12, [7] * 5])
def test_groups_of_any_length_and_order_keep_their_scales(groups):
    index = torch.tensor(groups)
    values, scales = torch.randint(-9, 9, (4, len(groups)), dtype=torch.int8), torch.rand(4, 8)
    linear = build([grouped(Codes(values, scales), index)], len(groups), torch.float32)
    assert torch.equal(linear.dense(), values * scales[:, index])
    x = torch.randn(3, len(groups))
    torch.testing.assert_close(linear.matmul(x), x @ linear.dense().T)


def test_parts_that_differ_in_form_lie_side_by_side():
    one, two = Codes(torch.ones(4, 16, dtype=torch.int8), torch.rand(4, 1)), torch.randn(3, 16)
    linear = build([one, two], 16, torch.float32)
    assert isinstance(linear, Stacked) and linear.dense().shape == (7, 16)
    x, bias = torch.randn(2, 16), torch.randn(7)
    torch.testing.assert_close(linear.matmul(x, bias), x @ linear.dense().T + bias)
