"""Memory on a GPU: what is left for pages is measured at the largest steps, and a step that finds too little is computed in parts."""

from threading import local

import pytest
import torch
from driver import PAGE_TOKENS, PAGES, ROOM, Driver, Ranks
from elsewhere import GIB, gpus, need, settle
from graphs import METER
from kvrun.device import Cpu, Cuda
from kvrun.engine import engine as engines_of
from kvrun.engine import pretended
from kvrun.engine.memory import SLACK, MemoryBudget
from kvrun.engine.sampling import MOST_ALTERNATIVES, Sampling
from kvrun.errors import OutOfMemory
from kvrun.nn.build import load_model
from kvrun.nn.loaded import LoadedModel
from kvrun.nn.vision.sight import Sight
from kvrun.rpc.convert import status
from kvrun.vision.largest import blank
from kvrun.vision.tiles import Size
from pictures import prompt as shown_in

TOKENS, ROWS = 12, 3  # of a step
PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 9, 30, 17)]
COSTLY = Sampling(temperature=1.0, top_p=0.99, repetition_penalty=1.1, top_logprobs=MOST_ALTERNATIVES, prompt_logprobs=True)
WEIGHT = 1 << 23  # bytes of an image's features
SCORED = Sampling(temperature=0.8, seed=3, top_p=0.9, top_logprobs=2, prompt_logprobs=True)


@pytest.fixture
def on_gpu(checkpoint):
    """(free bytes, ...) -> an engine on a GPU that is not there, whose pages come out of what is free."""
    need("stand-in")
    threads = local()

    def load(folder, **more):
        if not hasattr(threads, "device"):  # the threads are the engines' own and end with them
            threads.device = settle()
        with torch.inference_mode():  # in which the stand-in has no views of tensors that were made outside
            return load_model(folder, device=Cuda(0), **more)

    with gpus(1, measured=True):
        yield lambda free, row="llama", **flags: Ranks(
            checkpoint(row), load_model=load, captured=(1, 2), budget=MemoryBudget(**flags, free=lambda: free)
        )


def wanted(ranks, monkeypatch) -> list[int]:
    """What a reservation of as many pages as there may be finds to be wanted beside them."""
    found, beside = [], engines_of.Engine._beside
    monkeypatch.setattr(engines_of.Engine, "_beside", lambda self, *sizes: found.append(beside(self, *sizes)) or found[-1])
    return found


def test_pages_take_what_the_largest_step_leaves(on_gpu, monkeypatch):
    found = wanted(None, monkeypatch)
    ranks = on_gpu(1 << 26, adapter_bytes=1 << 20)
    (grant,) = ranks.each(lambda engine: engine.reserve(0, TOKENS, ROWS, 0))
    page, (beside,) = ranks.engines[0].page_bytes, found
    left = int((1 << 26) * (1 - SLACK))
    useful = ranks.engines[0].model.positions // PAGE_TOKENS * ROWS + (1 << 20) // page
    assert grant.pages == min((left - beside) // page, useful) and beside > 0
    assert grant.adapter_bytes == 1 << 20, "of the host's, not of what is left here"
    assert grant.captured == (1, 2)


def test_no_step_takes_more_than_was_measured(on_gpu, adapter, monkeypatch):
    found = wanted(None, monkeypatch)
    ranks = on_gpu(GIB, adapter_bytes=1 << 20)
    ranks.each(lambda engine: engine.reserve(PAGES + ROOM, TOKENS, ROWS, 0))
    ranks.load(1, adapter("rank64"))
    driver = Driver(ranks.step)
    for index in range(ROWS):
        driver.add(index, PROMPTS[1], 2, COSTLY, adapter=index % 2)
    METER.reset()
    driver.run(chunk=TOKENS // ROWS)
    most = METER.most()
    assert 0 < most < found[0], (most, found)


def heavy(self, data, features=Sight.features):
    """Sight.features whose rows lie within `WEIGHT` bytes of their own, as those of large models do."""
    rows = features(self, data)
    more = rows.new_zeros(len(rows), WEIGHT // rows.element_size() // len(rows))
    return torch.cat([rows, more], 1)[:, : rows.shape[1]]


@pytest.mark.parametrize(("row", "images"), [("llava_next", 2), ("gemma3_panned", 2), ("idefics", 3)])
def test_no_step_full_of_images_takes_more_than_was_measured(row, images, on_gpu, monkeypatch):
    monkeypatch.setattr(Sight, "features", heavy)
    monkeypatch.setattr(Sight, "largest", lambda self: blank(Size(16, 16)))  # of those that take a while here
    found, ranks = wanted(None, monkeypatch), on_gpu(GIB, row, adapter_bytes=1 << 20)
    engine = ranks.engines[0]
    ids, shown = shown_in(engine.model.spec.images, [engine.model.sight.largest()] * images)
    ranks.each(lambda engine: engine.reserve(PAGES, len(ids) + ROWS - 1, ROWS, 0))
    (measured,) = found
    driver, looked_at = Driver(ranks.step), engine.model.sight.memory_tokens(PAGE_TOKENS) * images
    driver.add(0, ids, 1, COSTLY, images=shown, looked_at=looked_at)
    METER.reset()
    driver.run()
    most = METER.most()
    assert not driver.errors and images * WEIGHT < most < measured, (most, measured)


def test_a_source_of_which_a_step_is_full_takes_no_more_than_was_measured(on_gpu, monkeypatch):
    monkeypatch.setattr(pretended, "ENDLESS", 128)
    found, ranks = wanted(None, monkeypatch), on_gpu(GIB, "t5", adapter_bytes=1 << 20)
    ranks.each(lambda engine: engine.reserve(PAGES, 64, ROWS, 0))
    driver = Driver(ranks.step)
    driver.add(0, [0], 1, COSTLY, source=(PROMPTS[2] * 3)[:63])
    METER.reset()
    driver.run()
    most, (measured,) = METER.most(), found
    assert not driver.errors and measured / 4 < most < measured, (most, measured)


def test_a_cache_that_does_not_fit_beside_the_largest_step_is_refused(on_gpu):
    ranks = on_gpu(1 << 26, kv_cache_bytes=(1 << 26) - (1 << 16), adapter_bytes=1 << 20)
    with pytest.raises(OutOfMemory, match=r"--kv-cache-bytes \d+ does not fit: \d+ are left beside the weights"):
        ranks.each(lambda engine: engine.reserve(0, TOKENS, ROWS, 0))


def test_a_step_that_never_fits_is_an_error_of_the_start(on_gpu, monkeypatch):
    ranks = on_gpu(GIB)
    monkeypatch.setattr(LoadedModel, "forward", lambda *_: _short())
    with pytest.raises(OutOfMemory, match=r"a step of 12 tokens in 3 rows does not fit .* lower --max-batch-prefill-tokens"):
        ranks.each(lambda engine: engine.reserve(0, TOKENS, ROWS, 0))


def short(too_large):
    """LoadedModel.forward with memory for less than what is too large."""
    forward = LoadedModel.forward

    def run(self, batch, pool, recorded=None):
        if too_large(batch):
            # What it had written by then is written again.
            pool.kv.layers[0][batch.slots // PAGE_TOKENS, :, :, batch.slots % PAGE_TOKENS] = torch.nan
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, batch, pool, recorded)

    return run


def answers(ranks) -> Driver:
    ranks.reserve()
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 5, SCORED if index % 2 else None)
    driver.run(chunk=16)
    assert not driver.errors
    return driver


@pytest.mark.parametrize(("what", "too_large"), [
    ("rows", lambda batch: len(batch.contexts) > 1),
    ("tokens", lambda batch: len(batch.ids) > 3),
    ("a prompt, now and then", lambda batch: len(batch.ids) > len(batch.contexts) and int(batch.contexts.sum()) % 2),
])  # fmt: skip
def test_a_step_without_memory_is_computed_in_parts_and_loses_nothing(what, too_large, engines, monkeypatch):
    expected = answers(engines())
    reclaimed = []
    monkeypatch.setattr(Cpu, "reclaim", lambda self: reclaimed.append(self))
    monkeypatch.setattr(LoadedModel, "forward", short(too_large))
    found = answers(engines())
    assert reclaimed
    assert found.answers == expected.answers and found.details == expected.details
    for index, prompt in expected.prompts.items():
        assert [(t.id, t.top) for t in found.prompts[index]] == [(t.id, t.top) for t in prompt], what


def test_sampling_without_memory_is_done_in_parts_too(engines, monkeypatch):
    expected, sample = answers(engines()), engines_of.sample

    def little(logits, choices, *more):
        if len(choices) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(logits, choices, *more)

    monkeypatch.setattr(engines_of, "sample", little)
    found = answers(engines())
    assert (found.answers, found.details, found.prompts) == (expected.answers, expected.details, expected.prompts)


@pytest.mark.parametrize(("row", "world"), [("mamba", 1), ("llama", 2)])
def test_what_cannot_be_computed_again_ends_the_epoch_and_is_replayed(row, world, engines, monkeypatch):
    expected, ranks = answers(engines(row, world)).answers, engines(row, world)
    driver, calls = Driver(ranks.step), []
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 5, SCORED if index % 2 else None)
    driver.turn()
    driver.turn()
    # Every rank is short at once: one that is short alone ends its process, and the others with it.
    monkeypatch.setattr(LoadedModel, "forward", lambda *_: calls.append(_short()))
    with pytest.raises(torch.OutOfMemoryError) as error:
        driver.turn()
    assert status(error.value).name == "RESOURCE_EXHAUSTED" and not calls
    monkeypatch.undo()
    ranks.reserve()
    again = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        again.add(index, prompt, 5, SCORED if index % 2 else None, committed=driver.answers[index])
    assert again.run() == expected


def _short() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")
