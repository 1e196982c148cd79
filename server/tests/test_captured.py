"""Decoding steps that were captured as CUDA graphs: the answers of steps that were not, whoever joins, leaves or changes adapters.

There need be no GPU: `graphs.py` stands in for one's graphs. Where there is one, `pytest -m gpu` runs the same tests on it.
"""

from threading import local

import pytest
import torch
from driver import Driver, Ranks
from elsewhere import gpus, need, settle
from graphs import GRAPHS, NotCapturable, Stale
from kvrun.config import ServeConfig
from kvrun.device import Cuda
from kvrun.engine.sampling import Sampling
from kvrun.errors import ConfigError
from kvrun.lora import fixed
from kvrun.lora.fixed import FixedAdapters
from kvrun.nn.build import load_model
from kvrun.nn.captured import CapturedSteps
from kvrun_kernels.capture import Captures, obstacle
from test_device import Wire
from test_moe import experts_adapters

SIZES = (1, 2, 4)
PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 7, 13, 5)]
COUNTS = (5, 6, 7, 5)  # four rows decode at once, then three, two and one
DRAWN = Sampling(temperature=0.9, seed=5, top_k=40, top_p=0.9)


@pytest.fixture(params=("stand-in", pytest.param("cuda", marks=pytest.mark.gpu)))
def on_gpu(request, checkpoint):
    """(row, sizes) -> an engine on a GPU, or on one that is not there, with steps of so many rows captured."""
    need(request.param)
    threads = local()

    def load(folder, **more):
        if request.param != "cuda" and not hasattr(threads, "device"):  # the threads are the engines' own and end with them
            threads.device = settle()
        return load_model(folder, device=Cuda(0), **more)

    def made(row="llama", sizes=SIZES):
        ranks = Ranks(checkpoint(row), load_model=load, captured=sizes)
        ranks.reserve(adapter_bytes=1 << 24)
        return ranks

    if request.param == "cuda":
        yield made
        return
    with gpus(1):
        GRAPHS.clear()
        yield made


@pytest.fixture
def two_ranks(checkpoint, tmp_path):
    """Engines of two ranks, each on a GPU that is not there, with steps of four rows captured."""
    need("stand-in")
    threads = local()

    def load(folder, *, group, **more):
        if not hasattr(threads, "device"):
            threads.device = settle()
        group._device = group._host and Wire(group._host)
        return load_model(folder, device=Cuda(group.rank), group=group, **more)

    with gpus(2):
        ranks = Ranks(checkpoint("llama"), 2, tmp_path / "rendezvous", load_model=load, captured=(4,))
        ranks.reserve()
        yield ranks


@pytest.fixture
def served(monkeypatch) -> list[tuple[int, bool, bool]]:
    """Of every step: its rows, whether one has an adapter, and whether a capture served it."""
    steps, layers = [], CapturedSteps.layers

    def seen(self, x, batch):
        found = layers(self, x, batch)
        steps.append((len(batch.contexts), batch.lora is not None, found is not None))
        return found

    monkeypatch.setattr(CapturedSteps, "layers", seen)
    return steps


def answers(ranks, handles=(0,), sampling=None) -> dict:
    """Answers to requests that join one after another; request n has adapter handles[n % len]."""
    driver = Driver(ranks.step)
    for index, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        driver.add(index, prompt, count, sampling, adapter=handles[index % len(handles)])
        driver.turn(chunk=16)
    found = driver.run(chunk=16)
    assert not driver.errors
    return found


@pytest.mark.parametrize(("flag", "sizes"), [("1,2,16", (1, 2, 16)), ("8, 4,8", (4, 8)), ("0", ()), (None, ())])
def test_sizes_are_numbers_of_rows_and_0_is_none(flag, sizes):
    words = [] if flag is None else [f"--cuda-graphs={flag}"]
    assert ServeConfig.parse(["model", "--uds-path=socket", *words], {}).cuda_graphs == sizes


@pytest.mark.parametrize("flag", ["0,1", "a", "", "1,,2", "-1"])
def test_other_sizes_are_refused_by_name(flag):
    with pytest.raises(ConfigError, match=r"--cuda-graphs .* is no list of numbers above 0"):
        ServeConfig.parse(["model", "--uds-path=socket", f"--cuda-graphs={flag}"], {})


@pytest.mark.parametrize("sampling", [None, DRAWN], ids=("greedy", "drawn"))
def test_captured_steps_answer_as_those_that_are_not(sampling, on_gpu, engines, served):
    assert answers(on_gpu(), sampling=sampling) == answers(engines(), sampling=sampling)
    assert {rows for rows, _, captured in served if captured} == {1, 2, 3, 4}, "three rows take the capture of four"


@pytest.mark.parametrize("row", ["falcon40b", "mixtral", "gemma3", "olmo2"])
def test_every_kind_of_layer_is_captured(row, on_gpu, engines, served):
    assert answers(on_gpu(row)) == answers(engines(row))
    assert any(captured for *_, captured in served)


def test_ranks_meet_within_captured_steps(two_ranks, engines, served):
    assert answers(two_ranks) == answers(engines())
    assert any(captured for *_, captured in served)


def test_adapters_of_any_rank_join_after_the_capture_beside_rows_without(on_gpu, engines, adapter, served):
    names = ("rank3", "rank64", "patterns")
    found = []
    for ranks in (on_gpu(), engines()):
        for handle, name in enumerate(names, start=1):
            ranks.load(handle, adapter(name))
        found.append(answers(ranks, handles=(1, 0, 2, 3)))
    assert found[0] == found[1]
    assert {rows for rows, adapted, captured in served if captured and adapted} >= {2, 3, 4}


def test_an_adapter_that_takes_another_s_place_is_the_one_that_answers(on_gpu, engines, adapter, served):
    def run(ranks) -> dict:
        driver = Driver(ranks.step)
        for handle, name in enumerate(("rank8", "rslora", "rank16", "rank1"), start=1):
            ranks.load(handle, adapter(name))
            driver.add(handle, PROMPTS[1], 4, adapter=handle)
            driver.run()
            ranks.each(lambda engine, handle=handle: engine.adapters.unload(handle))
        return driver.answers

    found = run(on_gpu())
    assert found == run(engines()) and len({tuple(ids) for ids in found.values()}) == 4
    assert (1, True, True) in served


def each_of(ranks, folders, mixes) -> list[dict]:
    """Answers to the same requests with adapters in these mixes of handles, which count from 1."""
    found = []
    for handles in mixes:
        ranks.reserve(adapter_bytes=1 << 24)
        for handle, folder in enumerate(folders, start=1):
            ranks.load(handle, folder)
        found.append(answers(ranks, handles))
    return found


def test_a_rank_beyond_what_captures_have_room_for_is_computed_without_one(on_gpu, engines, adapter, served, monkeypatch):
    monkeypatch.setattr(fixed, "MOST_RANK", 48)
    folders = [adapter("rank16"), adapter("rank64")]
    ranks, captured = on_gpu(), []
    for handle in (1, 2):
        served.clear()
        assert each_of(ranks, folders, [(handle,)]) == each_of(engines(), folders, [(handle,)])
        captured.append({rows for rows, adapted, was in served if adapted and was})
    assert captured == [{1, 2, 3, 4}, set()]


def test_adapters_of_experts_answer_from_captures(on_gpu, engines, checkpoint, tmp_path, served):
    folders, mixes = experts_adapters("mixtral", checkpoint("mixtral"), tmp_path), ((1, 0, 2, 1), (0,))
    found = each_of(on_gpu("mixtral"), folders, mixes)
    assert found == each_of(engines("mixtral"), folders, mixes) and found[0] != found[1]
    assert {rows for rows, adapted, captured in served if captured and adapted} >= {1, 2, 3, 4}


def of_the_first_row(self) -> int:
    """That row's first page, where rows of nobody would write over its first token."""
    return int(self._batch.page_table[0, 0]) if hasattr(self, "_kept") else self._pool.kv.pages


@pytest.mark.parametrize("on_gpu", ["stand-in"], indirect=True)
@pytest.mark.parametrize(("what", "planted"), [
    ("adapters of an earlier step", (FixedAdapters, "fill", lambda self, batch: True)),
    ("rows of nobody in somebody's page", (CapturedSteps, "_spare", of_the_first_row)),
])  # fmt: skip
def test_what_a_capture_must_not_keep_is_seen_if_it_does(what, planted, on_gpu, engines, adapter, monkeypatch):
    monkeypatch.setattr(*planted)
    found = []
    for ranks in (on_gpu(), engines()):
        ranks.load(1, adapter("rank8"))
        found.append(answers(ranks, handles=(1, 0)))
    assert found[0] != found[1], what


@pytest.mark.parametrize("on_gpu", ["stand-in"], indirect=True)
def test_a_table_that_moves_after_the_capture_is_seen(on_gpu, monkeypatch):
    ranks = on_gpu()
    # As if it had not been made as long as any sequence before the capture.
    for rotary in ranks.engines[0].model.decoder.rotaries:
        rotary.rows = 1
    with pytest.raises(Stale, match="is gone"):
        answers(ranks)


@pytest.mark.parametrize("gpu", ["stand-in"], indirect=True)
@pytest.mark.parametrize(("run", "why"), [
    (lambda x: x.sum().item(), "waits for the device"),
    (lambda x: x.tolist(), "between"),
    (lambda x: x.cpu(), "between"),
    (lambda x: x.copy_(torch.ones(3)), "between"),
    (lambda x: x[x > 1], "waits for the device"),
    (lambda x: x.nonzero(), "waits for the device"),
])  # fmt: skip
def test_what_no_graph_can_hold_is_found_before_it_is_captured(run, why, gpu):
    x = torch.arange(3.0, device=gpu.place)
    assert why in obstacle(lambda: run(x))
    with pytest.raises(NotCapturable, match=why):
        Captures().capture(lambda: run(x))


@pytest.mark.parametrize("gpu", ["stand-in"], indirect=True)
def test_a_graph_computes_again_over_what_its_tensors_hold_now(gpu):
    held, y = {"x": torch.arange(4.0, device=gpu.place)}, torch.zeros(2, device=gpu.place)
    index, captures = torch.tensor([1, 3], device=gpu.place), Captures()

    def run() -> None:
        inner = torch.empty_like(held["x"])
        torch.mul(held["x"], 2.0, out=inner)
        y.copy_((inner + torch.ones_like(inner)).view(2, 2).reshape(-1)[index])

    assert obstacle(run) == ""
    replay = captures.capture(run)
    other = captures.capture(lambda: y.add_(held["x"][:2] * 0))
    for start in (0.0, 5.0):
        held["x"].copy_(torch.arange(start, start + 4))
        replay()
        other()
        assert y.tolist() == [2 * start + 3, 2 * start + 7]
    held.clear()
    with pytest.raises(Stale):
        replay()
