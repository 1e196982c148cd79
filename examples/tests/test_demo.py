"""The committed demo model and adapters: they load, they are small, and each writes what it was trained to write."""

import json
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))

torch = pytest.importorskip("torch")
pytest.importorskip("peft", reason="the adapters are checked with peft: pip install 'kvrun[test]'")

import check  # noqa: E402
from styles import STYLES  # noqa: E402

COUNT = 12


@pytest.fixture(scope="module")
def demo():
    return check.Demo()


@pytest.fixture(scope="module")
def tests():
    return check.tests()


@pytest.mark.parametrize("name", [check.BASE, *STYLES])
def test_it_writes_what_it_was_trained_to_write(name, demo, tests):
    answers = demo.answers(name, COUNT)
    for what, passes in tests[name].items():
        failed = [answer.text for answer in answers if not passes(answer)]
        assert len(failed) <= COUNT * (1 - check.FLOOR), f"{what}: {failed}"


@pytest.mark.parametrize("name", STYLES)
def test_the_base_alone_does_not_write_like_an_adapter(name, demo, tests):
    form = tests[name][f"is {name}"]
    assert not any(form(answer) for answer in demo.answers(check.BASE, 4))


def test_any_text_survives_the_tokenizer(demo):
    for text in ("Once upon a time", "naïve café 🦊 漢字", " two  spaces\n\n\ttab ", "\x00\x7f", "<s> is not </s> here"):
        ids = demo.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert demo.tokenizer.decode(ids) == text


def test_the_chat_template_writes_the_form_the_model_learned(demo):
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "A story?"}]
    text = demo.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>Hi<|assistant|>Hello!</s><|user|>A story?<|assistant|>"


def test_a_second_turn_is_answered_from_the_first(demo):
    first = "<s><|user|>Tell me a story about Pip the fox who lost his red kite.<|assistant|>"
    ((story, _),) = demo.write(check.BASE, [first], 320)
    ((reply, ended),) = demo.write(check.BASE, [f"{first}{story}</s><|user|>Who was Pip?<|assistant|>"], 40)
    assert ended
    assert reply.startswith("Pip was a")
    assert "fox" in reply


def test_adapters_differ_in_rank_targets_and_scaling():
    configs = [json.loads(path.read_text()) for path in DEMO.glob("adapters/*/adapter_config.json")]
    assert len({config["r"] for config in configs}) >= 4
    assert len({tuple(config["target_modules"]) for config in configs}) >= 4
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)


def test_the_demo_is_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 12_000_000
