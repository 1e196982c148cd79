"""A step on its way: its tokens are chosen where the model lies, and the host learns of them when they have come over."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch import Tensor

from kvrun.device import Landing, Mark
from kvrun.engine.batch import Work, judged
from kvrun.engine.sampler import FAILED, Choice, Scored
from kvrun.engine.sampling import TokenLogprob
from kvrun.engine.sequence import Outcome, Row, RowOutcome, Sequence, Step

NAN_LOGITS = "nan_logits: the model's scores for the next token are not finite numbers"


@dataclass(frozen=True)
class Told:
    """What some rows have to say, each in the rows' order."""

    sampled: Scored | None  # every token that they sample; None for none
    judged: Scored | None  # prompt tokens whose log-probabilities are asked for; None for none, and on ranks other than 0


@dataclass(frozen=True)
class Chosen:
    """Rows that were computed and sampled after."""

    work: Items[Work]
    sampled: Tensor | None  # [S] int64, the ids, where the model lies
    told: Landing[Told]
    began: Mark
    computed: Mark
    chosen: Mark


class Turn:
    """A step that was launched. Its sequences go on at once, with ids that only the device knows; `outcome` tells them to the host."""

    def __init__(self, step: Step, lost: Items[Sequence], parts: Items[Chosen], rank: int) -> None:
        """lost: sequences with a row that is not computed · parts: what was computed, one after another"""
        self._step, self._lost, self._parts, self._rank = step, lost, parts, rank
        self._outcome: Outcome | None = None
        for part in parts:
            at = 0
            for row, sequence in part.work:
                if not row.drafts:
                    sequence.computed = row.start + row.tokens
                    if row.sample:
                        sequence.expect(at)
                at += samples(row)

    @property
    def over(self) -> bool:
        """Whether its outcome is known."""
        return self._outcome is not None

    @property
    def sampled(self) -> Tensor | None:
        """The ids that sequences await, where the model lies. Of one part, for a turn of several is over before the next."""
        return self._parts[0].sampled

    @property
    def drafted(self) -> set[int]:
        """Sequences of which nobody knows yet how many tokens are computed."""
        return {row.sequence for part in self._parts for row, _ in part.work if row.drafts}

    @property
    def landed(self) -> bool:
        """Whether `outcome` has nothing to wait for."""
        return all(part.told.landed for part in self._parts)

    def wait(self) -> None:
        """Return when `outcome` has nothing to wait for. Any thread may wait."""
        for part in self._parts:
            part.told.wait()

    def outcome(self) -> Outcome:
        """What the step did, once it is done. Those of earlier turns come first."""
        if self._outcome is None:
            rows = {sequence.number: RowOutcome(sequence.number, error=sequence.error) for sequence in self._lost}
            for part in self._parts:
                for said in self._settle(part.work, part.told.get()):
                    before = rows.get(said.sequence)  # the first half of a row that was cut in two
                    rows[said.sequence] = said if before is None else replace(said, prompt=[*before.prompt, *said.prompt])
            forward = sum(part.computed.since(part.began) for part in self._parts)
            sampling = sum(part.chosen.since(part.computed) for part in self._parts)
            told = [] if self._rank else [rows[row.sequence] for row in self._step.rows]
            self._outcome = Outcome(self._step.number, told, forward, sampling)
        return self._outcome

    def _settle(self, work: Items[Work], told: Told) -> Iterator[RowOutcome]:
        """Take what was sampled into the sequences, and say it."""
        ids = iter(told.sampled.ids.tolist() if told.sampled else ())
        tokens: Iterator[TokenLogprob | None] = iter(())
        prompts: Iterator[TokenLogprob | None] = iter(())
        if told.sampled is not None and not self._rank:
            tokens = iter(told.sampled.tokens([s.sampling.top_logprobs for row, s in work for _ in range(samples(row))]))
        if told.judged is not None:
            prompts = iter(told.judged.tokens([s.sampling.top_logprobs for row, s in work for _ in range(judged(row, s))]))
        for row, sequence in work:
            count = samples(row)
            kept = self._learn(row, sequence, list(islice(ids, count)))
            sampled = [token for token in list(islice(tokens, count))[:kept] if token is not None]
            prompt = _reported(row, sequence, list(islice(prompts, judged(row, sequence)))) if sequence.sampling.prompt_logprobs else ()
            yield RowOutcome(sequence.number, sampled, prompt, sequence.error)

    def _learn(self, row: Row, sequence: Sequence, picked: Items[int]) -> int:
        """Take a row's sampled ids into its sequence; how many of them count.

        A draft is accepted while it is what the sampler picked there anyway. Since a pick depends on position and ids alone,
        the answer is the one that single steps would have given.
        """
        end = row.start + row.tokens - len(row.drafts)
        if sequence.images is not None:
            sequence.images.forget(end)
        if not row.drafts:
            if picked:
                sequence.learn(max(picked[0], 0))
            if FAILED in picked and not sequence.error:
                # The next step may have been launched, here or on another rank, and computes the row on all of them.
                sequence.fail(NAN_LOGITS, self._step.number + 2)
            return 0 if sequence.error else len(picked)
        accepted = 0
        while accepted < len(row.drafts) and picked[accepted] == row.drafts[accepted]:
            accepted += 1
        sequence.computed = end + accepted
        if FAILED in picked[: accepted + 1]:
            sequence.fail(NAN_LOGITS, self._step.number + 1)
            return 0
        sequence.append(picked[: accepted + 1])
        return accepted + 1


def samples(row: Row) -> int:
    """How many tokens a row samples: one after each draft and one after the last known token."""
    return 1 + len(row.drafts) if row.sample else 0


def choices(row: Row, sequence: Sequence) -> list[Choice]:
    """What the sampler must know for each token that the row samples: with drafts, as if those before it were accepted."""
    if not row.sample:
        return []
    ids = sequence.ids[: row.start + row.tokens - len(row.drafts)]
    if not row.drafts:
        return [Choice(sequence.sampling, ids, sequence.prompt_tokens)]
    supposed = np.concatenate([ids, np.asarray(row.drafts, np.int64)])
    return [Choice(sequence.sampling, supposed[: len(ids) + count], sequence.prompt_tokens) for count in range(len(row.drafts) + 1)]


def _reported(row: Row, sequence: Sequence, tokens: Items[TokenLogprob | None]) -> list[TokenLogprob]:
    """The row's own prompt tokens with their log-probabilities; that of the token after it waits for the row that computes it."""
    found = [sequence.pending_prompt] if sequence.pending_prompt else []
    sequence.pending_prompt = None
    found += [token for token in tokens if token is not None]
    if len(tokens) == row.tokens:
        sequence.pending_prompt = found.pop()
    return found
