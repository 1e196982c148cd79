"""Steps that are launched while the one before runs: the answers of steps one at a time, and no wait that would have them run so.

There need be no GPU: `streams.py` has what is copied to the host arrive late. Where there is one, `pytest -m gpu` runs the same
tests on it.
"""

from threading import local

import pytest
import streams
import torch
from ahead import Ahead, Launches
from driver import Driver, Ranks
from elsewhere import gpus, need, settle
from kvrun.device import Cuda, Flight
from kvrun.engine import batch as batches
from kvrun.engine import engine as engines_of
from kvrun.engine.sampling import Sampling
from kvrun.nn.batch import Fed
from kvrun.nn.build import load_model
from kvrun.nn.loaded import LoadedModel
from test_device import Wire

PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 11, 7, 5, 3)]
COUNTS = (7, 3, 6, 4, 5)  # answers end one after another, so rows change their places
WAYS = {
    "greedy": Sampling(top_logprobs=3),
    "drawn": Sampling(temperature=0.9, seed=5),
    "penalised": Sampling(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={7: 2.0}, suppressed=(2, 9), suppressed_until=3),
    "scored": Sampling(temperature=1.1, seed=3, presence_penalty=0.2, prompt_logprobs=True, top_logprobs=2),
    "cut": Sampling(temperature=0.8, seed=9, top_k=40, top_p=0.9),
}
FLOWING = ("greedy", "drawn", "penalised", "scored")  # what never waits


@pytest.fixture(params=("stand-in", pytest.param("cuda", marks=pytest.mark.gpu)))
def on_gpus(request, checkpoint, tmp_path):
    """(row, world, sizes) -> the engines of that many ranks on GPUs, or on some that are not there, with steps of so many rows captured."""
    need(request.param)
    threads = local()

    def load(folder, *, group, **more):
        if request.param != "cuda":
            if not hasattr(threads, "device"):  # the threads are the engines' own and end with them
                threads.device = settle()
            group._device = group._host and Wire(group._host)
        return load_model(folder, device=Cuda(group.rank), group=group, **more)

    def made(row="llama", world=1, sizes=()):
        if request.param == "cuda" and world > torch.cuda.device_count():
            pytest.skip(f"{world} GPUs: not here")
        ranks = Ranks(checkpoint(row), world, tmp_path / "rendezvous", load_model=load, captured=sizes)
        ranks.reserve(adapter_bytes=1 << 24)
        return ranks

    if request.param == "cuda":
        yield made
        return
    with gpus(2):
        yield made


def follow(driver, ways=("greedy",), adapters=(0,), requests=3):
    """Requests that join one after another, request n in ways[n % len] with the adapter of handle adapters[n % len]."""
    for index, (prompt, count) in enumerate(zip(PROMPTS[:requests], COUNTS)):
        driver.add(index, prompt, count, WAYS[ways[index % len(ways)]], adapter=adapters[index % len(adapters)])
        driver.turn(chunk=8)
    driver.run(chunk=8)
    return {index: (driver.answers[index], driver.details[index], driver.prompts[index]) for index in driver.answers}


def same(ahead: dict, alone: dict) -> None:
    """Assert that answers are the same: the ids, and log-probabilities as far as the rows beside them allow."""

    def numbers(found):
        return [
            number for _, details, prompts in found.values() for t in (*details, *prompts) for number in (t.logprob, *dict(t.top).values())
        ]

    def ids(found):
        return {
            index: (answer, [(t.id, [i for i, _ in t.top]) for t in (*details, *prompts)])
            for index, (answer, details, prompts) in found.items()
        }

    assert ids(ahead) == ids(alone)
    assert numbers(ahead) == pytest.approx(numbers(alone), abs=1e-3)


def both(ranks, *what, load=lambda ranks: None) -> tuple[dict, dict, Launches]:
    """What requests are answered when steps run one at a time, and when each is launched before the one before is over."""
    load(ranks)
    alone = follow(Driver(ranks.step), *what)
    ranks.reserve(adapter_bytes=1 << 24)
    load(ranks)
    launches = Launches(ranks)
    return alone, follow(Ahead(launches), *what), launches


@pytest.mark.parametrize("sizes", [(), (1, 2, 4)], ids=("as they come", "captured"))
def test_overlapped_steps_answer_as_steps_one_at_a_time(sizes, on_gpus):
    alone, ahead, _ = both(on_gpus(sizes=sizes), tuple(WAYS), (0,), 5)
    same(ahead, alone)
    assert [len(alone[index][0]) for index in alone] == list(COUNTS) and alone[3][2], "answers and scores of a prompt"


def test_overlapped_steps_of_adapters_answer_as_steps_one_at_a_time(on_gpus, adapter):
    def load(ranks):
        for handle, name in enumerate(("rank3", "rank8"), start=1):
            ranks.load(handle, adapter(name))

    alone, ahead, _ = both(on_gpus(sizes=(2, 4)), ("greedy", "penalised"), (1, 0, 2), load=load)
    same(ahead, alone)


@pytest.mark.parametrize("row", ["llama", "mamba"])
def test_overlapped_steps_of_two_ranks_answer_as_steps_one_at_a_time(row, on_gpus):
    alone, ahead, _ = both(on_gpus(row, 2), ("greedy", "drawn", "penalised"))
    same(ahead, alone)


def test_overlapped_steps_carry_states_along(on_gpus):
    alone, ahead, _ = both(on_gpus("mamba2"), ("greedy", "scored"))
    same(ahead, alone)


def test_steps_on_the_host_are_over_when_they_were_launched(engines):
    alone, ahead, launches = both(engines(), tuple(WAYS), (0,), 5)
    assert ahead == alone and not launches.waits, "to the bit"


@pytest.mark.parametrize("on_gpus", ["stand-in"], indirect=True)
@pytest.mark.parametrize("ways", [FLOWING, ("cut",)], ids="+".join)
def test_nothing_waits_for_a_step_but_cuts_and_those_for_their_own(ways, on_gpus):
    launches = Launches(on_gpus(sizes=(1, 2, 4)))
    follow(Ahead(launches), ways, requests=4)
    assert len(launches.waits) > 4
    assert not [before for before, _ in launches.waits if before]
    assert bool([after for _, after in launches.waits if after]) == (ways != FLOWING)


def hasty(sample):
    """A sampler that looks at its choice."""

    def run(*given):
        scored = sample(*given)
        scored.ids.tolist()
        return scored

    return run


@pytest.mark.parametrize("on_gpus", ["stand-in"], indirect=True)
def test_a_wait_that_is_hidden_is_found(on_gpus, monkeypatch):
    monkeypatch.setattr(engines_of, "sample", hasty(engines_of.sample))
    launches = Launches(on_gpus())
    follow(Ahead(launches), requests=1)
    assert sum(bool(after) for _, after in launches.waits) > 4


class Plants:
    """What could go wrong with ids that the host does not know."""

    @staticmethod
    def of_another_row(monkeypatch):
        into = Fed.into
        monkeypatch.setattr(Fed, "into", lambda self, ids: into(Fed(self.tokens, self.rows.flip(0), self.sampled), ids))

    @staticmethod
    def of_an_earlier_step(monkeypatch):
        into, earlier = Fed.into, []

        def stale(self, ids):
            earlier.append(self.sampled)
            old = earlier[-2] if len(earlier) > 1 and len(earlier[-2]) == len(self.sampled) else self.sampled
            return into(Fed(self.tokens, self.rows, old), ids)

        monkeypatch.setattr(Fed, "into", stale)

    @staticmethod
    def nothing_at_all(monkeypatch):
        monkeypatch.setattr(batches, "_fed", lambda *_: None)

    @staticmethod
    def read_before_they_came(monkeypatch):
        monkeypatch.setattr(Flight, "wait", lambda self: None)
        monkeypatch.setattr(streams.Event, "elapsed_time", lambda self, end: 0.0)


@pytest.mark.parametrize("on_gpus", ["stand-in"], indirect=True)
@pytest.mark.parametrize("plant", [name for name in vars(Plants) if not name.startswith("_")])
def test_ids_that_are_not_the_right_ones_are_seen(plant, on_gpus, engines, monkeypatch):
    expected, ranks = follow(Driver(engines().step)), on_gpus()
    getattr(Plants, plant)(monkeypatch)
    found = follow(Ahead(Launches(ranks)))
    assert [found[index][0] for index in found] != [expected[index][0] for index in expected]


def poisoned(monkeypatch, at: int, row: int) -> None:
    """Make the scores of one row no numbers, in one step of each rank that has scores."""
    forward, steps = LoadedModel.forward, []

    def sick(self, batch, pool, recorded=None):
        logits = forward(self, batch, pool, recorded)
        if recorded is not None and logits is not None:
            steps.append(len(logits))
            if len(steps) == at:
                logits[row, 5] = torch.nan
        return logits

    monkeypatch.setattr(LoadedModel, "forward", sick)


@pytest.mark.parametrize(("world", "prompt"), [(1, ()), (2, ()), (2, (1,)), (2, (0,))])
def test_a_row_without_numbers_fails_alone_whoever_knows_of_it_first(world, prompt, on_gpus, monkeypatch):
    ranks, found = on_gpus("llama", world), []
    for at in (0, 4):
        ranks.reserve()
        poisoned(monkeypatch, at, 1)
        driver = Ahead(Launches(ranks, prompt))
        for index, text in enumerate(PROMPTS[:3]):
            driver.add(index, text, 7)
        driver.run()
        found.append(driver)
        monkeypatch.undo()
    healthy, sick = found
    assert sick.errors.keys() == {1} and sick.errors[1].startswith("nan_logits") and not healthy.errors
    assert sick.answers[1] == healthy.answers[1][:3]
    assert all(sick.answers[index] == healthy.answers[index] for index in (0, 2))


@pytest.mark.parametrize("where", ["forward", "sample"])
def test_a_step_without_memory_beside_another_is_computed_in_parts(where, on_gpus, monkeypatch):
    ranks = on_gpus()
    alone = follow(Driver(ranks.step), ("drawn", "scored"))
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
    found = follow(Ahead(Launches(ranks)), ("drawn", "scored"))
    assert {index: found[index][0] for index in found} == {index: alone[index][0] for index in alone}
    assert len(short) > 3


def test_a_row_that_follows_drafts_waits_for_them(on_gpus):
    ranks = on_gpus()
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[1], 8)
    plain = driver.run()[0]
    ranks.reserve()
    launches, driver = Launches(ranks), Driver(ranks.step)
    driver.add(0, PROMPTS[1], 8)
    first = driver.row(0)
    known = len(PROMPTS[1])
    guesses = [plain[1], (plain[2] + 1) % 259]  # one right, one wrong
    second = engines_of.Row(0, known, 3, [driver.free.pop() for _ in range(2)], True, guesses)
    third = engines_of.Row(0, known + 2, 1, [], True, [])
    said = [launches.step(engines_of.Step(1, [], driver._admit, [first]))]
    for number, rows in enumerate(([second], [third], None), start=2):
        said.append(launches.step(rows and engines_of.Step(number, [], [], rows)))
    assert [token.id for outcome in said[1:] for token in outcome.rows[0].tokens] == plain[:4]
