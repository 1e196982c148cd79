"""A router in a hundred lines: engines of a group kept in step, and sequences driven through them with pages and chunks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from kvrun.dist import Group
from kvrun.engine.engine import Engine
from kvrun.engine.images import Image
from kvrun.engine.memory import MemoryBudget
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Outcome, Placement, Row, RowOutcome, Step
from kvrun.lora.adapter import Adapter
from kvrun.nn.build import LoadedModel, load_model

PAGE_TOKENS, PAGES, STEP_TOKENS, SEQUENCES = 4, 600, 512, 64
ROOM = 2000  # pages after those of sequences, where adapters are placed in pages


class Ranks:
    """The engines of one group, each on a thread of its own, given the same calls; rank 0 answers."""

    def __init__(
        self,
        folder: Path,
        world: int = 1,
        rendezvous: Path | None = None,
        dtype: str = "float32",
        quantize: str | None = None,
        load_model: Callable[..., LoadedModel] = load_model,
        captured: Sequence[int] = (),
        budget: MemoryBudget | None = None,
        arithmetic: Callable[[], AbstractContextManager] = nullcontext,
        kv_dtype: str | None = None,
    ) -> None:
        """arithmetic: what every call is made within, on a thread of its own"""
        self._threads, self._arithmetic = ThreadPoolExecutor(world), arithmetic
        self.world = world
        self._wanted: dict[int, int] = {}  # pages of each adapter
        self._placed: set[int] = set()
        self._room = PAGES  # where the next adapter is placed

        def load(rank: int) -> Engine:
            torch.set_num_threads(1)
            group = Group.join(rendezvous, rank, world, timeout_s=60) if world > 1 else Group.single()
            with arithmetic():
                model = load_model(folder, dtype=dtype, group=group, quantize=quantize)
                return Engine(model, group, budget or MemoryBudget(1 << 26, 1 << 26), PAGE_TOKENS, kv_dtype, captured)

        self.engines = list(self._threads.map(load, range(world)))
        self.each(lambda engine: engine.warm())

    def each(self, call: Callable[[Engine], object]) -> list:
        """What the call returns on every rank, run on all of them at once."""

        def within(engine: Engine) -> object:
            with self._arithmetic():
                return call(engine)

        return list(self._threads.map(within, self.engines))

    def reserve(self, pages: int = PAGES, adapter_bytes: int = 0) -> None:
        """Forget everything."""
        self._wanted, self._placed, self._room = {}, set(), pages
        more = ROOM * self.engines[0].places_adapters
        self.each(lambda engine: engine.reserve(pages + more, STEP_TOKENS, SEQUENCES, adapter_bytes))

    def load(self, handle: int, path: Path) -> Adapter:
        """Load an adapter on every rank."""
        loaded = self.each(lambda engine: engine.adapters.load(handle, path.name, str(path)))
        self._wanted[handle] = max(adapter.pages for adapter in loaded)
        return loaded[0]

    def placed(self, step: Step) -> Step:
        """The step with a place for each adapter that wants one, that it admits the first sequence with and does not place itself."""
        self._placed -= set(step.displace)
        self._placed |= {place.adapter for place in step.place}
        absent = dict.fromkeys(
            admit.adapter for admit in step.admit if self._wanted.get(admit.adapter) and admit.adapter not in self._placed
        )
        for handle in absent:
            step = replace(step, place=[*step.place, Placement(handle, self._room)])
            self._room += self._wanted[handle]
        self._placed |= absent.keys()
        return step

    def step(self, step: Step) -> Outcome:
        """Run a step on every rank; the others must have nothing to say."""
        step = self.placed(step)
        first, *others = self.each(lambda engine: engine.step(step))
        assert all(other.number == step.number and not other.rows for other in others)
        return first


class Driver:
    """Follows sequences from admission to release."""

    def __init__(self, step: Callable[[Step], Outcome], pages: int = PAGES, page_tokens: int = PAGE_TOKENS) -> None:
        self._step = step
        self._page_tokens = page_tokens
        # Scattered pages: an engine that took a sequence's pages to be adjacent would be seen.
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
        self.number = 0
        self.answers: dict[int, list[int]] = {}
        self.details: dict[int, list] = {}  # every TokenLogprob of a sequence
        self.prompts: dict[int, list] = {}  # log-probabilities of its prompt
        self.errors: dict[int, str] = {}
        self._computed: dict[int, int] = {}
        self._known: dict[int, int] = {}
        self._wanted: dict[int, int] = {}
        self._pages: dict[int, list[int]] = {}
        self._memory: dict[int, list[int]] = {}
        self._admit: list[Admit] = []
        self._release: list[int] = []
        self._displace: list[int] = []
        self._place: list[Placement] = []

    def move(self, handle: int, first: int | None = None) -> None:
        """Displace an adapter with the next step, or place it in the pages from `first` on."""
        if first is None:
            self._displace.append(handle)
        else:
            self._place.append(Placement(handle, first))

    def add(
        self,
        sequence: int,
        prompt: Sequence[int],
        count: int,
        sampling: Sampling | None = None,
        adapter: int = 0,
        committed: Sequence[int] = (),
        images: Sequence[Image] = (),
        source: Sequence[int] = (),
        long: bool = False,
        looked_at: int = 0,
    ) -> None:
        """Admit a sequence with the next step; it is released after `count` answer tokens, the committed ones among them.

        looked_at: tokens of memory for its images
        """
        memory = self._memory[sequence] = [self.free.pop() for _ in range(-(-(len(source) + looked_at) // self._page_tokens))]
        tokens, sampling = [*prompt, *committed], sampling or Sampling()
        self._admit.append(Admit(sequence, tokens, len(prompt), sampling, adapter, images, source, memory, long))
        self.answers[sequence], self.details[sequence], self.prompts[sequence] = list(committed), [], []
        self._computed[sequence], self._known[sequence], self._pages[sequence] = 0, len(prompt) + len(committed), []
        self._wanted[sequence] = count

    def release(self, sequence: int) -> None:
        """Forget a sequence with the next step; its pages are free for that very step."""
        self._release.append(sequence)
        self.free.extend(self._pages.pop(sequence) + self._memory.pop(sequence))
        del self._wanted[sequence]

    @property
    def running(self) -> list[int]:
        """The sequences that are not released."""
        return list(self._wanted)

    def row(self, sequence: int, chunk: int = STEP_TOKENS, drafts: Sequence[int] = ()) -> Row:
        """The next row of a sequence: at most `chunk` known tokens, then drafts; pages are taken for it."""
        start, known = self._computed[sequence], self._known[sequence]
        end = min(known, start + chunk)
        sample = end == known
        drafts = list(drafts) if sample else []
        pages = self._pages[sequence]
        held = len(pages)
        while len(pages) * self._page_tokens < end + len(drafts):
            pages.append(self.free.pop())
        return Row(sequence, start, end - start + len(drafts), pages[held:], sample, drafts)

    def turn(self, rows: Sequence[Row] | None = None, chunk: int = STEP_TOKENS) -> list[RowOutcome]:
        """Run one step over the rows given, or over one of each running sequence, and take in what it says."""
        rows = [self.row(sequence, chunk) for sequence in self.running] if rows is None else rows
        self.number += 1
        step = Step(self.number, self._release, self._admit, rows, self._displace, self._place)
        self._release, self._admit, self._displace, self._place = [], [], [], []
        outcome = self._step(step)
        assert outcome.number == self.number and [r.sequence for r in outcome.rows] == [r.sequence for r in rows]
        for row, said in zip(rows, outcome.rows, strict=True):
            sequence, ids = row.sequence, [token.id for token in said.tokens]
            self.prompts[sequence] += said.prompt
            self.details[sequence] += said.tokens
            self.answers[sequence] += ids
            self._computed[sequence] = row.start + row.tokens - (len(row.drafts) - len(ids) + 1 if row.sample else 0)
            self._known[sequence] += len(ids)
            if said.error:
                self.errors[sequence] = said.error
            if said.error or len(self.answers[sequence]) >= self._wanted[sequence]:
                self.release(sequence)
        return list(outcome.rows)

    def run(self, chunk: int = STEP_TOKENS) -> dict[int, list[int]]:
        """Turn until nothing runs; the answers, cut to what was wanted."""
        while self.running:
            self.turn(chunk=chunk)
        return self.answers


def answers(
    folder: Path, prompt: Sequence[int], at: Path, *, adapter: Path | None = None, world: int = 1, quantize: str | None = None
) -> list[list[int]]:
    """Greedy answers of 24 tokens to one prompt in one batch: of the base, and of the adapter if there is one. at: a free folder"""
    ranks = Ranks(folder, world, at / "rendezvous", quantize=quantize)
    ranks.reserve()
    driver = Driver(ranks.step)
    driver.add(0, prompt, 24)
    if adapter is not None:
        ranks.load(1, adapter)
        driver.add(1, prompt, 24, adapter=1)
    return list(driver.run(chunk=7).values())
