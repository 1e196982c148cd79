"""GGUF files are served as the checkpoints they were made from: to the bit in every type, on any rank, under adapters."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from adapters import ALL_LLAMA, likeliest, write_adapter
from blocks import all_of, served, write_gguf
from driver import answers
from kvrun import hub, models
from kvrun.dist import Group
from kvrun.errors import FilesError, Unsupported
from kvrun.gguf import Container, prepared
from kvrun.gguf.architecture import known
from kvrun.inspect import inspect_model
from kvrun.nn.build import load_model
from kvrun.nn.linear import Linear
from kvrun.quant import DenseLinear
from kvrun.quant.gguf import DECODERS
from quantized import write_oracle
from tiny import ROWS, oracle, randomise, write_checkpoint, write_tokenizer
from tiny.row import COMMON

PLAIN = ("F32", "F16", "BF16")
TYPES = (*PLAIN, *DECODERS)
# Rows of two and three blocks of 256, which two and three ranks cut inside a block.
CONFIG = {
    **COMMON, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "intermediate_size": 768, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
PROMPT = [5, 17, 99, 200, 3, 44, 7, 8, 120, 33]
# Rows whose files transformers puts under the right names; it leaves Falcon's new layout as the file has it, and knows no Command R.
READ_BY_TRANSFORMERS = ("llama", "llama_tied", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "gemma2", "gemma3_five_to_one", "phi3", "gpt2")
READ_BY_TRANSFORMERS += ("falcon7b", "bloom_5_heads", "starcoder2", "stablelm")
FILED = (*READ_BY_TRANSFORMERS, "llama_biased", "llama_multi_head", "llama_linear", "llama_yarn", "mixtral", "qwen2_moe_sparse")
FILED += ("qwen3_moe_mixed", "gemma", "gemma3", "phi3_longrope", "phi4_mini", "falcon11b", "falcon40b", "bloom", "mpt", "gpt_neox")
FILED += ("starcoder2_unbiased", "stablelm_parallel", "cohere", "cohere_plus", "granite", "olmo2")
FILED += ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3")


class Alone(Group):
    """One rank of a group that is never asked to talk."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)


def recommended(name: str, shape: tuple[int, ...]) -> str:
    """A mixture as Q4_K_M files have it: values and downs in more bits, and the head."""
    if "output.weight" in name and not name.startswith("blk"):
        return "Q6_K"
    return "Q6_K" if "attn_v" in name or "ffn_down" in name else "Q8_0" if "embd" in name else "Q4_K"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    logging.disable(logging.WARNING)
    folder = tmp_path_factory.mktemp("plain")
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    randomise(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory):
    """A type, or a mixture by its name -> (its model folder, a folder with the checkpoint that it stands for), made once."""
    at, known = tmp_path_factory.mktemp("made"), {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in known:
            folder = at / kind
            folder.mkdir()
            kinds = recommended if kind == "recommended" else all_of(kind)
            stands = write_gguf(plain, folder / "model.gguf", kinds)
            judge = folder / "judge"
            judge.mkdir()
            write_oracle(plain, judge, {name.removesuffix(".weight"): tensor for name, tensor in stands.items()})
            known[kind] = prepared(folder / "model.gguf", at / "cache"), judge, stands
        return known[kind]

    return make


def expected(linear: Linear, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What plain tensors say that a rank's linear is."""
    parts = [tensors[f"{source.module}.weight"][source.rows] for source in linear.sources]
    return torch.cat([part if s.cols is None else part[:, s.cols] for part, s in zip(parts, linear.sources, strict=True)])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", [*TYPES, "recommended"])
def test_weights_are_to_the_bit_what_the_package_reads_and_multiply_as_such(kind, world, made):
    folder, _, tensors = made(kind)
    for rank in range(world):
        model = load_model(folder, dtype="float32", group=Alone(rank, world))
        assert len(model.linears) == 2 * 4 + 1 and model.quantize == "gguf"
        for linear in model.linears:
            assert isinstance(linear.weight, DenseLinear) == (kind in PLAIN)
            assert torch.equal(linear.weight.dense().float(), expected(linear, tensors)), linear.sources[0].module
        for linear in (*model.linears[:4], model.linears[-1]):  # each role
            for dtype, room in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
                if kind in PLAIN and dtype != torch.float32:
                    continue
                x = torch.randn(5, linear.in_features).to(dtype)
                wanted = x.double() @ linear.weight.dense().double().T
                size = wanted.abs().max().item()
                torch.testing.assert_close(linear.weight.matmul(x).double(), wanted, rtol=room, atol=room * size)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q6_K", "recommended"])
def test_the_model_computes_what_the_checkpoint_of_the_same_weights_computes(kind, world, made, groups):
    folder, judge, _ = made(kind)
    groups[world].load(folder)
    torch.testing.assert_close(groups[world].step([(0, PROMPT)]), oracle(judge, [PROMPT])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [*DECODERS, "recommended"])
def test_adapters_over_blocks_answer_as_those_of_peft_over_the_weights(kind, made, tmp_path):
    folder, judge, _ = made(kind)
    changes = write_adapter(tmp_path / "changes", judge, r=8, lora_alpha=16, target_modules=[*ALL_LLAMA, "lm_head", "embed_tokens"])
    base, adapted = answers(folder, PROMPT, tmp_path, adapter=changes, world=2 if "K" in kind else 1)
    assert [adapted] == likeliest(judge, changes, [(PROMPT, adapted)])
    assert [base] == likeliest(judge, None, [(PROMPT, base)])
    assert adapted != base


@pytest.fixture(scope="module")
def filed(tmp_path_factory):
    """row -> (its checkpoint, its GGUF file, the model folder of that), float32 and made once."""
    written: dict[str, tuple[Path, Path, Path]] = {}

    def make(row: str) -> tuple[Path, Path, Path]:
        if row not in written:
            folder = tmp_path_factory.mktemp(row)
            write_checkpoint(row, folder / "checkpoint", _recoverable)
            write_gguf(folder / "checkpoint", folder / "model.gguf")
            written[row] = folder / "checkpoint", folder / "model.gguf", prepared(folder / "model.gguf", folder / "cache")
        return written[row]

    return make


def _recoverable(config: dict) -> dict:
    """What no file says is what the models were published with: Gemma's scale of scores, StarCoder's window, Qwen's sum of weights.

    DeepSeek's files say one of two numbers that were the same, and that experts have groups where they are chosen by them.
    """
    kind = config["model_type"]
    scale = {"query_pre_attn_scalar": config["head_dim"]} if "query_pre_attn_scalar" in config else {}
    window = {"sliding_window": None} if kind == "starcoder2" else {}
    share = {"norm_topk_prob": kind == "qwen3_moe"} if kind in ("qwen2_moe", "qwen3_moe") else {}
    stretch = config.get("rope_parameters") or {}
    same = {"rope_parameters": {**stretch, "mscale": stretch["mscale_all_dim"]}} if "mscale" in stretch else {}
    alone = {"n_group": 1, "topk_group": 1} if config.get("topk_method") == "greedy" else {}
    return {**config, **scale, **window, **share, **same, **alone}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", FILED)
def test_every_architecture_computes_what_its_checkpoint_computes(row, world, filed, groups):
    checkpoint, _, folder = filed(row)
    groups[world].load(folder)
    found, wanted = groups[world].step([(0, PROMPT)]), oracle(checkpoint, [PROMPT])[0]
    assert ((found - wanted).abs().max() / wanted.std()).item() < 1e-3


@pytest.mark.parametrize("early", [True, False])
def test_latent_attention_is_read_from_files_of_every_age_and_type(early, tmp_path, groups, monkeypatch):
    """Each head's keys and values lie together in the first ones; in blocks, turned round, in later ones."""
    wide = {"qk_nope_head_dim": 32, "kv_lora_rank": 64, "v_head_dim": 32, "qk_rope_head_dim": 16}
    narrow = ROWS["deepseek_v2_lite"]
    monkeypatch.setitem(ROWS, "deepseek_v2_wide", replace(narrow, config={**narrow.config, **wide}))
    write_checkpoint("deepseek_v2_wide", tmp_path / "plain", _recoverable)
    folder = tmp_path / "file"
    folder.mkdir()
    stands = write_gguf(tmp_path / "plain", folder / "model.gguf", lambda name, shape: "Q8_0" if "_b." in name else "F32", early=early)
    write_oracle(tmp_path / "plain", folder, {name.removesuffix(".weight"): tensor for name, tensor in stands.items()})
    model = prepared(folder / "model.gguf", tmp_path / "cache")
    wanted = oracle(folder / "oracle", [PROMPT])[0]
    for world in (1, 2):
        groups[world].load(model)
        assert ((groups[world].step([(0, PROMPT)]) - wanted).abs().max() / wanted.std()).item() < 1e-3
    _, found = models.read(model)
    assert found == replace(models.read(tmp_path / "plain")[1], leftovers=found.leftovers)


@pytest.mark.parametrize("row", READ_BY_TRANSFORMERS)
def test_transformers_computes_the_same_from_the_same_file(row, filed, groups):
    """Its names and layouts, that is, with the checkpoint's config: it leaves out soft caps and factors of rotations."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint, file, folder = filed(row)
    own = {"config": AutoConfig.from_pretrained(checkpoint), "attn_implementation": ROWS[row].attention}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **own).eval()
    groups[1].load(folder)
    found = groups[1].step([(0, PROMPT)])
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPT])).logits[0]
    assert ((found - wanted).abs().max() / wanted.std()).item() < 1e-3


SAME = [row for row in FILED if row not in ("llama_tied", "phi3_longrope")]


@pytest.mark.parametrize("row", SAME)
def test_a_file_s_metadata_describe_the_model_that_its_config_described(row, filed):
    """Where rotations are not stored as factors of each frequency."""
    checkpoint, _, folder = filed(row)
    (_, wanted), (_, found) = models.read(checkpoint), models.read(folder)
    assert replace(found, leftovers=wanted.leftovers) == wanted


def test_an_embedding_and_a_head_stay_in_blocks_and_a_tied_one_is_held_once(plain, made, tmp_path):
    folder, _, tensors = made("Q6_K")
    model = load_model(folder, dtype="float32")
    ids = torch.tensor([3, 258, 0])
    assert torch.equal(model.decoder.embed.rows(ids), tensors["model.embed_tokens.weight"][ids])
    tied = json.loads((plain / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied").mkdir()
    for file in plain.iterdir():
        (tmp_path / "tied" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tied" / "config.json").write_text(json.dumps(tied))
    less = load_model(served(tmp_path / "tied", tmp_path, all_of("Q6_K")), dtype="float32")
    assert torch.equal(less.decoder.embed.rows(ids), less.linears[-1].weight.dense()[ids])
    assert 259 * 256 * 1.1 < model.weight_bytes - less.weight_bytes < 259 * 256 * 1.3  # 8.6 bits each, in panels of 32


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [*TYPES, "recommended"])
def test_what_a_file_will_take_is_known_from_its_header(kind, world, made):
    folder, _, _ = made(kind)
    held = max(load_model(folder, dtype="float32", group=Alone(rank, world)).weight_bytes for rank in range(world))
    facts = inspect_model(folder, "float32", world)
    assert facts.rank_weight_bytes == pytest.approx(held, rel=0.05)
    assert facts.parameters == load_model(folder).parameters == 2 * 259 * 256 + 2 * (256 * (2 * 512 + 2 * 256 + 3 * 768) + 2 * 256) + 256


def test_what_is_asked_and_what_the_file_is_must_agree(made):
    folder, _, _ = made("Q4_0")
    assert load_model(folder, quantize="gguf").quantize == "gguf"
    with pytest.raises(Unsupported, match="--quantize int4 was asked for and the checkpoint is quantized with gguf; leave the flag out"):
        load_model(folder, quantize="int4")


@pytest.mark.parametrize(("kind", "computed"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q4_K", "bfloat16")])
def test_a_model_computes_in_the_type_of_its_plain_matrices(kind, computed, made):
    assert str(load_model(made(kind)[0]).dtype) == f"torch.{computed}"


def test_a_model_in_parts_is_one_model(plain, tmp_path):
    tensors = write_gguf(plain, tmp_path / "whole.gguf", all_of("Q8_0"))
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    count, half = 2, len(reader.tensors) // 2
    for part, held in enumerate((reader.tensors[:half], reader.tensors[half:])):
        writer = gguf.GGUFWriter(tmp_path / f"m-{part + 1:05}-of-{count:05}.gguf", "llama")
        if part == 0:
            for field in reader.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    kind = field.types[0]
                    writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
        for tensor in held:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    folder = prepared(tmp_path / "m-00001-of-00002.gguf", tmp_path / "cache")
    for linear in load_model(folder, dtype="float32").linears:
        assert torch.equal(linear.weight.dense(), expected(linear, tensors))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FilesError, match=r"m-00002-of-00002\.gguf is not beside it; download all parts"):
        prepared(tmp_path / "m-00001-of-00002.gguf", tmp_path / "cache")


def test_a_folder_with_one_file_is_that_file_and_one_with_several_lists_them(plain, tmp_path):
    write_gguf(plain, tmp_path / "m-Q8_0.gguf", all_of("Q8_0"))
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    folder = hub.local(tmp_path, environ)
    assert folder == hub.local(tmp_path / "m-Q8_0.gguf", environ) and folder.is_relative_to(tmp_path / "cache")
    assert hub.local(folder, environ) == folder
    assert (folder / "m-Q8_0.gguf").resolve() == tmp_path / "m-Q8_0.gguf", "no weight is copied"
    (tmp_path / "m-Q4_0.gguf").write_bytes((tmp_path / "m-Q8_0.gguf").read_bytes())
    with pytest.raises(FilesError, match=r"holds 2 GGUF models: m-Q4_0.gguf, m-Q8_0.gguf; name one of them, as in"):
        hub.local(tmp_path, environ)


def test_a_file_that_was_replaced_is_read_anew(plain, tmp_path):
    folder = served(plain, tmp_path, all_of("Q8_0"))
    assert served(plain, tmp_path, all_of("Q4_0")) != folder


@pytest.mark.parametrize(
    ("number", "name", "said"), [(16, "IQ2_XXS", "is stored as IQ2_XXS, which is not read"), (99, "type 99", "is stored as type 99")]
)
def test_types_that_are_not_read_are_refused_by_name_with_what_to_use(number, name, said, plain, tmp_path):
    write_gguf(plain, tmp_path / "m.gguf", all_of("Q8_0"))
    raw = (tmp_path / "m.gguf").read_bytes()
    at = raw.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    (tmp_path / "m.gguf").write_bytes(raw[:at] + number.to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(Unsupported, match=f"tensor blk.0.attn_q.weight {said}.*Q4_K_M"):
        prepared(tmp_path / "m.gguf", tmp_path / "cache")


def test_an_architecture_that_is_not_read_is_refused_with_those_that_are(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2vl")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(Unsupported, match=rf"architecture qwen2vl are not read; the nearest is qwen2, read are {', '.join(known())}"):
        prepared(tmp_path / "m.gguf", tmp_path / "cache")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda raw: raw[: len(raw) - 100], "is short: its tensors end at byte"),
        (lambda raw: raw[:300], "is short or corrupt"),
        (lambda raw: raw[:4] + (9).to_bytes(4, "little") + raw[8:], r"is GGUF of version 9, read are \(2, 3\)"),
        (lambda raw: b"version https://git-lfs", "is a Git LFS pointer"),
        (lambda raw: b"PK\3\4" + raw[4:], "is no GGUF file: it begins with"),
        (lambda raw: b"", "is no GGUF file"),
    ],
)
def test_files_that_cannot_be_read_say_why(spoil, said, plain, tmp_path):
    write_gguf(plain, tmp_path / "m.gguf", all_of("Q8_0"))
    (tmp_path / "m.gguf").write_bytes(spoil((tmp_path / "m.gguf").read_bytes()))
    with pytest.raises((FilesError, Unsupported), match=said):
        prepared(tmp_path / "m.gguf", tmp_path / "cache")


def test_a_tensor_that_nobody_would_read_and_one_that_is_missing_are_named(plain, tmp_path):
    folder = served(plain, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(FilesError, match=r"holds 9 tensors \(model\.layers\.1\.input_layernorm\.weight, .*\) that nobody would read"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(FilesError, match=r"tensor model\.layers\.0\.mlp\.gate_proj\.F32 is \[768, 256, 4\], not \[512, 256, 4\]"):
        load_model(folder)


def test_numbers_of_32_bits_are_those_that_were_meant(plain, tmp_path):
    write_gguf(plain, tmp_path / "m.gguf")
    assert Container.open(tmp_path / "m.gguf").field("llama.attention.layer_norm_rms_epsilon") == 1e-6
    assert math.isinf(Container(tmp_path, {"general.architecture": "x", "x.y": math.inf}, {}, ()).field("{arch}.y"))
