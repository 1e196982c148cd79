"""A tiny Flan-T5 and a tiny Mamba behind launcher, router and shards: /generate answers as transformers does, also past a crash."""

import os
import signal

import pytest
import torch
from tiny import oracle_model, write_checkpoint
from tokenizers import Tokenizer
from tree import BIN, PROMPTS, running, together

NEW = 24
ASKED = [*PROMPTS[:5], "A", "And then? " * 15]
LONG = "What did the fox say to the dog? " * 46  # 1,518 tokens of a tokenizer of bytes


@pytest.fixture(scope="module", params=[("t5", 1), ("flan_t5", 1), ("flan_t5_untied", 2), ("mamba", 2), ("mamba2", 1)], ids=str)
def served(request, tmp_path_factory):
    """A running tree, and the folder of what it serves."""
    if not (BIN / "text-generation-launcher").exists():
        pytest.skip("text-generation-launcher is not installed: run `make install`")
    row, ranks = request.param
    folder = write_checkpoint(row, tmp_path_factory.mktemp(row))
    with running("--model-id", str(folder), "--dtype", "float32", "--num-shard", str(ranks), "--max-total-tokens", "2048") as tree:
        yield tree, folder


def greedy(folder, prompts: list[str]) -> list[str]:
    """What transformers' own `generate` answers to each prompt alone."""
    model, tokenizer = oracle_model(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        # Its cache knows one number of layers for both stacks of a model that has two.
        how = {"do_sample": False, "max_new_tokens": NEW, "use_cache": not model.config.is_encoder_decoder}
        said = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0].tolist()
        answers.append(tokenizer.decode(said[1 if model.config.is_encoder_decoder else ids.shape[1] :]))
    return answers


def test_generate_answers_as_transformers_does_to_all_at_once(served):
    tree, folder = served
    answers = together([lambda prompt=prompt: tree.generate(prompt, max_new_tokens=NEW) for prompt in ASKED])
    assert not [answer.error for answer in answers if answer.error]
    assert [answer.text for answer in answers] == greedy(folder, ASKED)


def test_an_encoder_reads_a_long_source_whole(served):
    tree, folder = served
    with tree.client() as http:
        info = http.get("/info").json()
    if "memory" not in info["state_kinds"]:
        pytest.skip("a model without an encoder")
    assert info["max_input_tokens"] == 2047 < info["max_batch_prefill_tokens"]
    answers = together([lambda prompt=prompt: tree.generate(prompt, max_new_tokens=NEW) for prompt in (LONG, ASKED[0])])
    assert [answer.text for answer in answers] == greedy(folder, [LONG, ASKED[0]])


def test_a_stream_goes_on_when_its_shards_die(served):
    tree, _ = served
    alone = tree.stream(ASKED[0], max_new_tokens=100, do_sample=True, seed=3)

    def strike(answer) -> None:
        if len(answer.ids) == 10:
            os.kill(tree.shards()[-1], signal.SIGKILL)

    struck = tree.stream(ASKED[0], max_new_tokens=100, do_sample=True, seed=3, on_token=strike)
    assert struck.error is None and struck.terminals == 1
    assert (struck.ids, struck.text) == (alone.ids, alone.text) and len(alone.ids) > 20


def test_info_says_what_is_off_and_why(served):
    tree, _ = served
    with tree.client() as http:
        said = http.get("/info").text
    assert "prefix_cache" in said, said
