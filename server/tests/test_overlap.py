"""Steps that are launched before the host knows what the one before sampled: the answers of steps one at a time, to the bit.

The device is the host, which only pretends not to know yet; `test_overlap_on_gpus.py` has one that computes meanwhile.
"""

import pytest
import torch
from ahead import WAYS, Ahead, Late, Launches, follow
from driver import Driver, Ranks
from kvrun.device import Cpu
from kvrun.engine import engine as engines_of
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Row, Step
from kvrun.nn.loaded import LoadedModel
from kvrun.nn.vision.sight import Sight
from pictures import PARTS, prompt
from tiny.t5 import T5

PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 19, 7)]


@pytest.fixture
def late(monkeypatch):
    """Have every outcome be asked for before it is there."""
    monkeypatch.setattr(Cpu, "fetch", lambda self, made: Late(made))


def both(ranks: Ranks, *what, load=lambda ranks: None, **more) -> tuple[dict, dict]:
    """What requests are answered when steps run one at a time, and when each is launched before the one before is over."""
    found = []
    for driver in (Driver(ranks.step), Ahead(launches := Launches(ranks))):
        ranks.reserve(adapter_bytes=1 << 24)
        load(ranks)
        found.append(follow(driver, *what, **more))
    assert len(launches.waits) > 8, "steps whose outcome was taken while the next was launched"
    return found[0], found[1]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", ["llama", "falcon7b", "mixtral", "mamba", "mamba2"])
def test_overlapped_steps_answer_as_steps_one_at_a_time(row, world, engines, late):
    alone, ahead = both(engines(row, world), tuple(WAYS), requests=5)
    assert ahead == alone and all(len(answer) > 2 for answer, *_ in alone.values())


@pytest.mark.parametrize("world", [1, 2])
def test_overlapped_steps_of_adapters_answer_as_steps_one_at_a_time(world, engines, adapter, late):
    def load(ranks):
        for handle, name in enumerate(("rank3", "patterns", "rank64"), start=1):
            ranks.load(handle, adapter(name))

    alone, ahead = both(engines("llama", world), ("greedy", "penalised"), (1, 0, 2, 3), load=load, requests=5)
    assert ahead == alone


def test_overlapped_answers_to_sources_are_those_of_steps_one_at_a_time(engines, late):
    ranks, start = engines("t5"), T5["decoder_start_token_id"]
    found = []
    for driver in (Driver(ranks.step), Ahead(Launches(ranks))):
        ranks.reserve()
        for index, source in enumerate(PROMPTS):
            driver.add(index, [start], 6, WAYS["greedy"], source=source)
            driver.turn()
        driver.run()
        found.append(driver.details)
    assert found[0] == found[1]


@pytest.mark.parametrize("row", ["llava_next", "idefics"])
def test_images_are_read_when_the_outcome_before_was_taken(row, engines, late, monkeypatch):
    ranks, found, read = engines(row), [], []
    (engine,), features = ranks.engines, Sight.features

    def seen(self, data):
        read.append(engine._open is None or engine._open.over)
        return features(self, data)

    monkeypatch.setattr(Sight, "features", seen)
    spec = ranks.engines[0].model.spec.images
    memory = ranks.engines[0].describe()["images"]["memory"]
    for driver in (Driver(ranks.step), Ahead(Launches(ranks))):
        ranks.reserve()
        for index, parts in enumerate(PARTS.values()):
            tokens, images = prompt(spec, parts)
            # Some say now and then that a text ends, behind which its images are not seen.
            ending = Sampling(temperature=4.0, seed=index, logit_bias={2: 12.0})
            driver.add(index, tokens, 9, ending, images=images, looked_at=memory * len(images))
            driver.turn(chunk=16)
        found.append((driver.run(chunk=16), driver.errors))
    assert found[0] == found[1] and any(2 in answer[:-1] for answer in found[0][0].values())
    assert all(read) and len(read) > 8


def test_steps_on_the_host_are_over_when_they_were_launched(engines):
    ranks = engines()
    alone = follow(Driver(ranks.step), tuple(WAYS))
    ranks.reserve()
    launches = Launches(ranks)
    assert follow(Ahead(launches), tuple(WAYS)) == alone and not launches.waits


def poisoned(monkeypatch, at: int, row: int) -> None:
    """Make the scores of one row no numbers, in one step of the rank that has scores."""
    forward, steps = LoadedModel.forward, []

    def sick(self, batch, pool, recorded=None):
        logits = forward(self, batch, pool, recorded)
        if logits is not None:
            steps.append(len(logits))
            if len(steps) == at:
                logits[row, 5] = torch.nan
        return logits

    monkeypatch.setattr(LoadedModel, "forward", sick)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("world", "prompt_ranks"), [(1, ()), (2, ()), (2, (1,)), (2, (0,))])
def test_a_row_without_numbers_fails_alone_whoever_knows_of_it_first(world, prompt_ranks, way, engines, late, monkeypatch):
    ranks, found = engines("llama", world), []
    for at in (0, 4):
        ranks.reserve()
        with monkeypatch.context() as sickly:
            poisoned(sickly, at, 1)
            driver = Ahead(Launches(ranks, prompt_ranks))
            for index, text in enumerate(PROMPTS):
                driver.add(index, text, 7, WAYS[way] if way != "scored" else Sampling(temperature=1.1, seed=3))
            driver.run()
        found.append(driver)
    healthy, sick = found
    assert sick.errors.keys() == {1} and sick.errors[1].startswith("nan_logits") and not healthy.errors
    assert sick.answers[1] == healthy.answers[1][:3]
    assert all(sick.answers[index] == healthy.answers[index] for index in (0, 2))


@pytest.mark.parametrize("where", ["forward", "sample"])
def test_a_step_without_memory_beside_another_is_computed_in_parts(where, engines, late, monkeypatch):
    ranks = engines()
    alone = follow(Driver(ranks.step), tuple(WAYS), requests=5)
    ranks.reserve()
    owner, whole = (LoadedModel, LoadedModel.forward) if where == "forward" else (engines_of, engines_of.sample)
    short = []

    def little(*given):
        rows = len(given[1].contexts) if where == "forward" else len(given[1])
        if rows > 1:
            short.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(*given)

    monkeypatch.setattr(owner, where, little)
    assert follow(Ahead(Launches(ranks)), tuple(WAYS), requests=5) == alone
    assert len(short) > 8


@pytest.mark.parametrize("world", [1, 2])
def test_a_row_that_follows_drafts_waits_for_them(world, engines, late):
    ranks = engines("llama", world)
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[1], 8)
    plain = driver.run()[0]
    ranks.reserve()
    launches, driver, known = Launches(ranks), Driver(ranks.step), len(PROMPTS[1])
    driver.add(0, PROMPTS[1], 8)
    guesses = [plain[1], (plain[2] + 1) % 259]  # one right, one wrong
    steps = [
        Step(1, [], driver._admit, [driver.row(0)]),
        Step(2, [], [], [Row(0, known, 3, [driver.free.pop() for _ in range(2)], True, guesses)]),
        Step(3, [], [], [Row(0, known + 2, 1, [], True, [])]),
    ]
    said = [launches.step(step) for step in (*steps, None)][1:]
    assert [token.id for outcome in said for token in outcome.rows[0].tokens] == plain[:4]
