"""Steps made again from a recording: the same bits as without one, and never where something of the step would be missing."""

import kvrun_kernels
import pytest
import torch
from driver import Driver
from kvrun.engine.sampling import Sampling
from kvrun.nn import recorded

PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 9, 30, 33, 61)]

needs_library = pytest.mark.skipif(not kvrun_kernels.levels(), reason="native.so: not built")


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """The rows of every step that a recording served."""
    rows: list[int] = []
    run = recorded.Recorded.run

    def counted(self, x, batch):
        rows.append(len(x))
        return run(self, x, batch)

    monkeypatch.setattr(recorded.Recorded, "run", counted)
    return rows


def answers(ranks, handles=(0,)) -> dict:
    """Ids, log-probabilities and alternatives of five answers of unlike lengths; sequence n has adapter handles[n % len]."""
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 8 + 4 * index, Sampling(top_logprobs=3), adapter=handles[index % len(handles)])
    driver.run(chunk=16)
    return driver.details


@needs_library
@pytest.mark.parametrize("row", ("llama", "falcon7b", "gpt2", "qwen3", "gemma3"))
def test_recorded_steps_give_the_bits_of_those_that_are_not(row, engines, replays, monkeypatch):
    ranks = engines(row)
    found = answers(ranks)
    assert set(replays) >= {1, 2, 3}, "steps of these many rows repeat, and were expected to come from recordings"
    monkeypatch.setattr(recorded.RecordedSteps, "layers", lambda self, x, batch: None)
    ranks.reserve()
    assert answers(ranks) == found


@needs_library
@pytest.mark.parametrize("row", ("exaone4", "phi_normed_heads", "mixtral", "olmo2"))
def test_what_torch_computes_between_kernels_is_never_left_out(row, engines, monkeypatch):
    ranks = engines(row)
    found = answers(ranks)
    monkeypatch.setattr(recorded.RecordedSteps, "layers", lambda self, x, batch: None)
    ranks.reserve()
    assert answers(ranks) == found


@needs_library
def test_recorded_steps_of_adapters_give_the_bits_of_those_that_are_not(engines, adapter, replays, monkeypatch):
    ranks = engines("llama")

    def run() -> list[dict]:
        """As many rows each time, and the adapter on other ones."""
        found = []
        for handles in ((0, 3), (3, 0), (0,)):
            ranks.reserve(adapter_bytes=1 << 24)
            ranks.load(3, adapter("rank8"))
            found.append(answers(ranks, handles))
        return found

    found = run()
    assert replays
    monkeypatch.setattr(recorded.RecordedSteps, "layers", lambda self, x, batch: None)
    assert run() == found
