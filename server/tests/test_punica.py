"""The life of a batch with many adapters, told once from end to end on a tiny model, over the engine's own steps."""

import pytest
import torch
from adapters import ADAPTERS, likeliest
from driver import PAGES, Driver
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Step
from kvrun.errors import ProtocolError

pytestmark = pytest.mark.punica_test

LLAMA = [name for name, (row, _) in ADAPTERS.items() if row == "llama"]
PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(100 + n)).tolist() for n in (6, 3, 19, 11)]


@pytest.fixture
def ranks(engines, adapter):
    """An engine with every Llama adapter resident, handles counted from 1."""
    ranks = engines()
    for handle, name in enumerate(LLAMA, start=1):
        ranks.load(handle, adapter(name))
    return ranks


@pytest.fixture
def alone(engines, adapter):
    """(handle, prompt, count, sampling) -> the answer of that request when nothing else runs."""

    def answer(handle: int, prompt: list[int], count: int, sampling: Sampling | None = None) -> list[int]:
        ranks = engines()
        if handle:
            ranks.load(handle, adapter(LLAMA[handle - 1]))
        driver = Driver(ranks.step)
        driver.add(0, prompt, count, sampling, adapter=handle)
        return driver.run()[0]

    return answer


def test_a_batch_begins_with_its_prompts_and_gives_one_token_each(ranks):
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 5, adapter=index)
    said = driver.turn()
    assert [row.sequence for row in said] == [0, 1, 2, 3]
    assert all(len(row.tokens) == 1 and not row.error for row in said)
    assert [driver._computed[index] for index in range(4)] == [len(prompt) for prompt in PROMPTS]


def test_a_sequence_that_never_was_in_a_step_cannot_be_continued(ranks):
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[0], 5, adapter=1)
    driver.turn()
    driver._computed[0] += 1
    driver._known[0] += 1
    with pytest.raises(ProtocolError, match="tokens are computed"):
        driver.turn()


def test_each_step_adds_one_token_and_the_last_one_frees_everything(ranks):
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[0], 5, adapter=2)
    for count in range(1, 6):
        driver.turn()
        assert len(driver.answers[0]) == count
    assert driver.running == [] and sorted(driver.free) == list(range(PAGES))
    ranks.step(Step(driver.number + 1, driver._release, [], []))
    assert len(ranks.engines[0]._sequences) == 0


def test_requests_with_every_adapter_share_a_batch_and_answer_as_peft_does(ranks, checkpoint, adapter):
    driver = Driver(ranks.step)
    for handle in range(len(LLAMA) + 1):
        driver.add(handle, PROMPTS[handle % 4], 16, adapter=handle)
    answers = driver.run(chunk=8)
    for handle in range(len(LLAMA) + 1):
        pair = (PROMPTS[handle % 4], answers[handle])
        assert likeliest(checkpoint("llama"), adapter(LLAMA[handle - 1]) if handle else None, [pair]) == [answers[handle]]


def test_one_that_ends_leaves_the_others_as_they_are(ranks, alone):
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[0], 3, adapter=3)
    driver.add(1, PROMPTS[1], 14, adapter=3)
    while 0 in driver.running:
        driver.turn()
    assert driver.running == [1]
    assert driver.run()[1] == alone(3, PROMPTS[1], 14)


def test_requests_join_while_others_decode_and_end_in_their_own_order(ranks, alone):
    driver, ended = Driver(ranks.step), []
    counts = {0: 12, 1: 3, 2: 7}
    for index, wanted in counts.items():
        driver.add(index, PROMPTS[index], wanted, Sampling(temperature=1.0, seed=index), adapter=index + 1)
        before = set(driver.running)
        driver.turn()
        ended += sorted(before - set(driver.running))
    while driver.running:
        before = set(driver.running)
        driver.turn()
        ended += sorted(before - set(driver.running))
    assert ended == [1, 2, 0]
    for index, wanted in counts.items():
        assert driver.answers[index] == alone(index + 1, PROMPTS[index], wanted, Sampling(temperature=1.0, seed=index))


def test_a_cancelled_request_gives_back_its_pages_and_moves_no_other_answer(ranks, alone):
    driver = Driver(ranks.step)
    for index in range(4):
        driver.add(index, PROMPTS[index], 12, adapter=1 + index % 2)
    driver.turn(chunk=4)
    driver.release(2)  # in the middle of its prompt
    driver.turn()
    driver.release(1)  # while it decodes
    answers = driver.run()
    assert sorted(driver.free) == list(range(PAGES))
    assert answers[0] == alone(1, PROMPTS[0], 12) and answers[3] == alone(2, PROMPTS[3], 12)


def test_adapters_come_and_go_while_others_are_in_flight(engines, adapter, alone):
    wanted = {handle: alone(handle, PROMPTS[2], 10) for handle in (1, 2, 3)}
    ranks = engines()
    driver = Driver(ranks.step)
    ranks.load(1, adapter(LLAMA[0]))
    driver.add(1, PROMPTS[2], 10, adapter=1)
    driver.turn()
    ranks.load(2, adapter(LLAMA[1]))
    driver.add(2, PROMPTS[2], 10, adapter=2)
    for _ in range(4):
        driver.turn()
    driver.release(1)
    driver.turn()
    ranks.each(lambda engine: engine.adapters.unload(1))
    ranks.load(3, adapter(LLAMA[2]))
    driver.add(3, PROMPTS[2], 10, adapter=3)
    driver.run()
    assert driver.answers[1] == wanted[1][: len(driver.answers[1])]
    assert driver.answers[2] == wanted[2] and driver.answers[3] == wanted[3]
    held = ranks.engines[0].adapters
    for handle in (2, 3):
        held.unload(handle)
    assert held.bytes == 0
