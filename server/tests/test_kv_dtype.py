"""Keys and values in fewer bits than the model computes in: how near it stays to itself, and what a page takes."""

import json
from pathlib import Path

import pytest
import torch
from kvrun.config import KV_CACHE_DTYPES
from kvrun.dist import Group
from kvrun.engine.engine import Engine
from kvrun.engine.memory import MemoryBudget
from kvrun.inspect import inspect_model
from kvrun.nn.build import load_model
from kvrun.state.pages import page_bytes, stored_name, stored_type
from kvrun.state.shapes import STORED, PageShape
from ragged import PAGE_TOKENS, PAGES, SLOTS, Runner
from tiny import VOCABULARY

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"
NARROW = ("bfloat16", "float16", "fp8_e4m3fn", "fp8_e5m2", "int8")
QUESTIONS = ("The capital of France is", "Once upon a time there was a", "def fibonacci(n):", "To be or not to be,", "1 2 3 4 5 6")


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (1, 9, 40, 70)]


def distance(found, expected):
    """The usual difference of a logit, in standard deviations of the logits."""
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


def runner_of(folder, kv_dtype):
    runner = Runner()
    runner.load(folder)
    runner.kv = runner.model.pool(PAGES, PAGE_TOKENS, stored_type(kv_dtype), SLOTS)
    return runner


def logits_of(folder, kv_dtype, sequences):
    return runner_of(folder, kv_dtype).step(list(enumerate(sequences)))


@pytest.mark.parametrize("row", ("llama", "deepseek_v2", "t5", "gemma3"))
@pytest.mark.parametrize("kv_dtype,most", (("bfloat16", 0.1), ("int8", 0.5), ("fp8_e4m3fn", 0.5), ("fp8_e5m2", 0.8)))
def test_a_model_stays_near_its_float32_self(row, kv_dtype, most, checkpoint):
    folder = checkpoint(row)
    found = distance(logits_of(folder, kv_dtype, prompts()), logits_of(folder, "float32", prompts()))
    print(f"{row} {kv_dtype}: {found:.4f}")
    assert 1e-5 < found < most


@pytest.mark.parametrize("kv_dtype", ("fp8_e4m3fn", "fp8_e5m2", "int8"))
def test_chunks_and_neighbours_change_no_bit(kv_dtype, checkpoint):
    folder = checkpoint("llama")
    whole = logits_of(folder, kv_dtype, prompts())
    runner, parts = runner_of(folder, kv_dtype), []
    for sequence, tokens in enumerate(prompts()):
        for start in range(0, len(tokens), 7):
            parts.append(runner.step([(sequence, tokens[start : start + 7])]))
    assert torch.equal(torch.cat(parts), whole)


def test_the_demo_answers_as_with_a_float32_cache():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    runner, asked = runner_of(DEMO, "float32"), [tokenizer.encode(text).ids for text in QUESTIONS]
    answers: list[list[int]] = [[] for _ in asked]
    steps = list(enumerate(asked))
    for _ in range(48):
        ends = torch.tensor([len(tokens) for _, tokens in steps]).cumsum(0) - 1
        chosen = runner.step(steps)[ends].argmax(-1).tolist()
        steps = [(sequence, [token]) for sequence, token in enumerate(chosen)]
        for answer, token in zip(answers, chosen):
            answer.append(token)
    said = [prompt + answer[:-1] for prompt, answer in zip(asked, answers)]
    for kv_dtype, least in (("float32", 1.0), ("bfloat16", 0.97), ("int8", 0.97), ("fp8_e4m3fn", 0.9), ("fp8_e5m2", 0.85)):
        logits = logits_of(DEMO, kv_dtype, said).split([len(tokens) for tokens in said])
        same = [part[len(prompt) - 1 :].argmax(-1) == torch.tensor(a) for part, prompt, a in zip(logits, asked, answers)]
        agreed = torch.cat(same).float().mean().item()
        print(f"{kv_dtype}: the likeliest token is the same at {agreed:.1%} of {48 * len(asked)} places")
        assert agreed >= least


@pytest.mark.parametrize("kv_dtype", NARROW)
def test_pages_take_what_is_planned(kv_dtype, checkpoint):
    folder = checkpoint("llama")
    model = load_model(folder, dtype="float32")
    planned = inspect_model(folder, "float32", kv_dtype=kv_dtype)
    pool = model.pool(3, 16, stored_type(kv_dtype))
    assert pool.kv.bytes == 3 * planned.page_bytes and planned.kv_dtype == kv_dtype
    number, scale = STORED[kv_dtype]
    assert planned.page_bytes == 2 * 2 * 2 * 16 * (16 * number + scale)  # layers, key and value, heads, tokens, width
    engine = Engine(model, Group.single(), MemoryBudget(1 << 20, 1 << 20), kv_dtype=kv_dtype)
    engine.warm()
    said = engine.describe()
    assert (said["kv_dtype"], said["page_bytes"]) == (kv_dtype, planned.page_bytes)
    assert engine.reserve(0, 64, 2, 0).pages == min((1 << 20) // planned.page_bytes, 2 * -(-model.positions // 16))


def test_every_name_of_the_command_line_is_a_format():
    assert KV_CACHE_DTYPES[1:] == tuple(STORED)
    for name in STORED:
        assert stored_name(stored_type(name)) == name
        assert page_bytes([PageShape(2, 8), PageShape(1, 40, planes=1)], 4, stored_type(name)) == 4 * (
            PageShape(2, 8).bytes(name) + PageShape(1, 40, planes=1).bytes(name)
        )


def test_inspect_takes_the_flag(checkpoint, capsys):
    from kvrun import inspect

    assert inspect.main([str(checkpoint("llama")), "--kv-cache-dtype", "int8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["model"]
    assert (facts["kv_dtype"], facts["page_bytes"]) == ("int8", 2 * 2 * 2 * 16 * 20)
