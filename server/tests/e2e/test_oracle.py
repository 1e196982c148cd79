"""Greedy answers through the whole tree equal transformers' and peft's, at one and two ranks, all in one batch."""

import pytest
from oracle import surprises
from tiny import write_checkpoint
from tree import DEMO, PROMPTS, demo_adapters, demo_flags, running, together

NEW = 64


def ids_of_all(tree, adapter: str | None) -> list[list[int]]:
    extra = {"adapter_id": adapter} if adapter else {}
    answers = together([lambda p=p: tree.generate(p, max_new_tokens=NEW, **extra) for p in PROMPTS])
    assert not [a.error for a in answers if a.error]
    return [a.ids for a in answers]


def check_demo(tree) -> None:
    for name, path in {None: None, **demo_adapters()}.items():
        assert not surprises(DEMO / "model", PROMPTS, ids_of_all(tree, name), NEW, path), f"adapter {name}"


def test_the_demo_and_each_of_its_adapters_answer_as_transformers_and_peft(demo):
    check_demo(demo)


def test_the_demo_on_two_ranks_answers_as_transformers_and_peft():
    with running(*demo_flags(), "--num-shard", "2") as tree:
        assert len(tree.shards()) == 2
        check_demo(tree)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("row", ["llama", "falcon40b", "gpt2"])
def test_a_random_checkpoint_answers_as_transformers(row, ranks, tmp_path):
    folder = write_checkpoint(row, tmp_path / row)
    with running("--model-id", str(folder), "--dtype", "float32", "--num-shard", str(ranks)) as tree:
        assert not surprises(folder, PROMPTS, ids_of_all(tree, None), NEW)
