"""Steps that are launched while the one before runs on a GPU: no wait that would have them run one at a time, and nothing read too soon.

There need be no GPU: `streams.py` has what is copied to the host arrive late. Where there is one, `pytest -m gpu` runs the same
tests on it.
"""

from threading import local

import pytest
import streams
from ahead import COUNTS, WAYS, Ahead, Launches, follow
from driver import Driver, Ranks
from elsewhere import gpus, need, settle
from kvrun.device import Cuda
from kvrun.engine import batch as batches
from kvrun.engine import engine as engines_of
from kvrun.nn.batch import Fed
from kvrun.nn.build import load_model
from kvrun.underway import Flight
from test_device import Wire

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
        ranks = Ranks(checkpoint(row), world, tmp_path / "rendezvous", load_model=load, captured=sizes)
        ranks.reserve(adapter_bytes=1 << 24)
        return ranks

    if request.param == "cuda":
        yield made
        return
    with gpus(2):
        yield made


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


@pytest.mark.parametrize("on_gpus", ["stand-in"], indirect=True)
def test_overlapped_steps_of_two_ranks_answer_as_steps_one_at_a_time(on_gpus):
    alone, ahead, _ = both(on_gpus("llama", 2), ("greedy", "drawn", "penalised"))
    same(ahead, alone)


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
    expected, ranks = follow(Driver(engines().step), requests=2), on_gpus()
    getattr(Plants, plant)(monkeypatch)
    found = follow(Ahead(Launches(ranks)), requests=2)
    assert [found[index][0] for index in found] != [expected[index][0] for index in expected]
