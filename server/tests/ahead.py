"""A router that sends a step before it knows what the last one said, and the engines that it sends it to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import streams
import torch
from driver import STEP_TOKENS, Driver, Ranks
from kvrun.engine.engine import Engine
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Outcome, Row, RowOutcome, Step
from kvrun.engine.turn import Turn

T = TypeVar("T")

PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 11, 7, 5, 3)]
COUNTS = (7, 3, 6, 4, 5)  # answers end one after another, so rows change their places
WAYS = {
    "greedy": Sampling(top_logprobs=3),
    "drawn": Sampling(temperature=0.9, seed=5),
    "penalised": Sampling(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={7: 2.0}, suppressed=(2, 9), suppressed_until=3),
    "scored": Sampling(temperature=1.1, seed=3, presence_penalty=0.2, prompt_logprobs=True, top_logprobs=2),
    "cut": Sampling(temperature=0.8, seed=9, top_k=40, top_p=0.9),
}


@dataclass(frozen=True)
class Late(Generic[T]):
    """What the host has, and is told when it asks for it: a landing as of a device that computes while the host goes on."""

    made: T
    landed = False

    def wait(self) -> None: ...

    def get(self) -> T:
        return self.made


class Launches:
    """The engines of a group, whose next step is launched before the outcome of the last is taken."""

    def __init__(self, ranks: Ranks, prompt: Sequence[int] = ()) -> None:
        """prompt: ranks that take every outcome at once, as if it had landed before the next step came"""
        self._ranks, self._prompt = ranks, prompt
        self._open: dict[int, Turn] = {}
        self.waits: list[tuple[list[str], list[str]]] = []  # what rank 0 waited for before the last outcome was taken, and after it

    def step(self, step: Step | None) -> Outcome | None:
        """Launch a step, or none, on every rank; rank 0's outcome of the step before."""
        if step is not None:
            step = self._ranks.placed(step)
        first, *others = self._ranks.each(lambda engine: self._launch(engine, step))
        assert all(other is None or not other.rows for other in others)
        return first

    def _launch(self, engine: Engine, step: Step | None) -> Outcome | None:
        rank, waits, taken = engine._group.rank, len(streams.WAITS), list[int]()
        before = self._open.pop(rank, None)

        def tell() -> None:
            assert before is not None and not taken, "an outcome is asked for once"
            taken.append(len(streams.WAITS))
            before.outcome()

        if step is not None:
            self._open[rank] = turn = engine.launch(step, tell)
            if rank == 0 and taken:
                self.waits.append((streams.WAITS[waits : taken[0]], streams.WAITS[taken[0] :]))
            if rank in self._prompt:
                turn.outcome()
        return None if before is None else before.outcome()


class Ahead(Driver):
    """Follows sequences like Driver, one step ahead of the outcomes: of a sequence that has ended, a surplus row is on its way."""

    def __init__(self, launches: Launches) -> None:
        super().__init__(launches.step)
        self._sent: Sequence[Row] = ()

    def turn(self, rows: Sequence[Row] | None = None, chunk: int = STEP_TOKENS) -> list[RowOutcome]:
        """Send a step of the rows given, or of one of each running sequence, and take in what the one before says."""
        rows = [self.row(sequence, chunk) for sequence in self.running] if rows is None else rows
        self.number += 1
        step = Step(self.number, self._release, self._admit, rows)
        self._release, self._admit = [], []
        for row in rows:
            self._computed[row.sequence] = row.start + row.tokens
            self._known[row.sequence] += row.sample
        sent, self._sent = self._sent, rows
        return self._take(sent, self._step(step))

    def run(self, chunk: int = STEP_TOKENS) -> dict[int, list[int]]:
        """Turn until nothing runs; the answers."""
        super().run(chunk)
        assert self._take(self._sent, self._step(None)) is not None
        self._sent = ()
        return self.answers

    def _take(self, sent: Sequence[Row], outcome: Outcome | None) -> list[RowOutcome]:
        if outcome is None:
            assert not sent
            return []
        assert [said.sequence for said in outcome.rows] == [row.sequence for row in sent]
        for said in outcome.rows:
            sequence = said.sequence
            if sequence not in self._wanted:
                continue
            self.prompts[sequence] += said.prompt
            self.details[sequence] += said.tokens
            self.answers[sequence] += [token.id for token in said.tokens]
            if said.error:
                self.errors[sequence] = said.error
            if said.error or len(self.answers[sequence]) >= self._wanted[sequence]:
                self.release(sequence)
        return list(outcome.rows)


def follow(
    driver: Driver, ways: Sequence[str] = ("greedy",), adapters: Sequence[int] = (0,), requests: int = 3, source: Sequence[int] = ()
) -> dict[int, tuple[list, list, list]]:
    """Requests that join one after another, request n in ways[n % len] with the adapter of handle adapters[n % len].

    The answer of each, all that is said of its tokens, and of its prompt's.
    """
    for index, (prompt, count) in enumerate(zip(PROMPTS[:requests], COUNTS)):
        driver.add(index, prompt, count, WAYS[ways[index % len(ways)]], adapter=adapters[index % len(adapters)], source=source)
        driver.turn(chunk=8)
    driver.run(chunk=8)
    return {index: (driver.answers[index], driver.details[index], driver.prompts[index]) for index in driver.answers}
