"""One turn after another over a loaded model: release, admit, compute, choose. Every rank runs the same turns."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import kvrun_kernels
import numpy as np
import torch
from torch import Tensor

from kvrun.dist import Group
from kvrun.engine import batch as batches
from kvrun.engine.batch import Work, judged
from kvrun.engine.memory import MemoryBudget
from kvrun.engine.pretended import largest, pretend
from kvrun.engine.sampler import Choice, alternatives, sample
from kvrun.engine.sampling import TokenLogprob
from kvrun.engine.sequence import Outcome, Row, RowOutcome, Sequence, SequenceTable, Step
from kvrun.errors import ImageError, OutOfMemory, ProtocolError, is_out_of_memory
from kvrun.lora.adapter import targets
from kvrun.lora.fixed import usual_adapter
from kvrun.lora.table import AdapterTable, Run
from kvrun.nn.loaded import LoadedModel
from kvrun.nn.recorded import Recordings
from kvrun.state.pages import stored_name, stored_type
from kvrun.state.pool import Pool

# Prompt tokens judged in one go: a whole chunk of them over a large vocabulary would double the memory of its logits.
JUDGED_AT_ONCE = 64
log = logging.getLogger("kvrun.engine")

FAILED = -1  # in place of a sampled id
NAN_LOGITS = "nan_logits: the model's scores for the next token are not finite numbers"


@dataclass(frozen=True)
class Grant:
    """What a reservation gave."""

    pages: int
    adapter_bytes: int
    captured: tuple[int, ...] = ()  # numbers of rows whose decoding steps are captured


class Engine:
    """This rank's model, its pages, its adapters and the sequences of the current epoch. Raises OutOfMemory if no page fits."""

    def __init__(
        self,
        model: LoadedModel,
        group: Group,
        budget: MemoryBudget,
        page_tokens: int = 16,
        kv_dtype: str | None = None,
        captured: Items[int] = (),
    ) -> None:
        """captured: numbers of rows whose decoding steps are captured where the device wants that"""
        self.model = model
        self.page_tokens = page_tokens
        self.kv_dtype = stored_type(kv_dtype) if kv_dtype else model.dtype
        self.adapters = AdapterTable(model.linears, model.dtype, model.decoder.embed, model.device.place)
        self._group = group
        self._budget = budget
        self._pool: Pool | None = None
        self._sizes = captured
        self._recorded: Recordings | None = None  # steps over the pool
        self._sequences: SequenceTable | None = None
        # A budget that holds no page or no state is an error of the start, not of the first epoch.
        budget.pages(0, self.page_bytes, 0, 1, model.slot_bytes)
        self._limits = (0, 0)  # tokens and rows of one step
        self._number = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of this rank, all layers."""
        return self.model.page_bytes(self.page_tokens, self.kv_dtype)

    @property
    def kernels(self) -> dict[str, str]:
        """What serves each op for this model, and each kind of its layers that attends to pages of this format."""
        return self.model.kernels | self.model.decoder.attention.serving(self.kv_dtype)

    def warm(self) -> None:
        """Run the model over a few tokens and over one, so that no request pays for what is set up on first use of either.

        Every rank must call it alike.
        """
        model, pool = self.model, self._little_pool()
        for tokens in (min(self.page_tokens, model.positions or self.page_tokens), 1):
            row, sequence = pretend(model, tokens, self.page_tokens)
            self._read([sequence], pool)
            self._forward([(row, sequence)], pool)

    def _little_pool(self) -> Pool:
        """Pages for steps that nobody asked for."""
        return self.model.pool(2, self.page_tokens, self.kv_dtype)

    def describe(self) -> dict[str, Any]:
        """What was loaded, by the wire's names for it."""
        model = self.model
        return {
            "model_digest": model.digest,
            "architecture": model.architecture,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_dtype": stored_name(self.kv_dtype),
            "activation_dtype": model.activation_dtype,
            "device": str(model.device.place),
            "threads": kvrun_kernels.get_num_threads(),
            "vocabulary": model.vocabulary,
            "vocabulary_limit": model.vocabulary_limit,
            "positions": model.positions,
            "long_after": model.long_after,
            "end_tokens": list(model.end_tokens),
            "kernels": self.kernels,
            "page_bytes": self.page_bytes,
            "page_tokens": self.page_tokens,
            "state_kinds": model.state_kinds,
            "decoder_start": model.spec.start,
            "quantize": model.quantize,
            "weight_bytes": model.weight_bytes,
            "parameters": model.parameters,
            "lora_targets": targets(model.linears, model.decoder.embed),
            "images": None if model.sight is None else model.sight.rule(self.page_tokens),
        }

    def reserve(self, pages: int, step_tokens: int, sequences: int, adapter_bytes: int) -> Grant:
        """Forget every sequence and adapter and allocate pages. Raises OutOfMemory, ProtocolError.

        step_tokens, sequences: the most tokens and rows of one step · 0 pages or bytes = this rank's own budget.
        """
        if step_tokens < 1 or sequences < 1:
            raise ProtocolError(f"steps of {step_tokens} tokens and {sequences} rows were reserved; both must be at least 1")
        reach = -(-self.model.positions // self.page_tokens)
        pool, slots = self._pool, sequences if self.model.slot_shapes else 0
        # A pool of the size asked for is kept: allocating it again would touch every page of it.
        if pool is None or pool.slots.slots != slots or (pages and pages != pool.kv.pages):
            self._pool = self._recorded = self._sequences = pool = None  # before the next one, so that both never exist at once
            self.adapters.reset(0)
            beside = self._beside(step_tokens, sequences, self._budget.adapters(adapter_bytes))
            granted_pages = self._budget.pages(pages, self.page_bytes, reach * sequences, slots, self.model.slot_bytes, beside)
            self._pool = pool = self.model.pool(granted_pages, self.page_tokens, self.kv_dtype, slots)
            self._recorded = self.model.recorded(pool, self._captured(sequences))
            if self._recorded.sizes:
                log.info("decoding steps are captured", extra={"fields": {"rows": self._recorded.sizes}})
        granted = self._budget.adapters(adapter_bytes)
        self.adapters.reset(granted)
        self._limits, self._number = (step_tokens, sequences), 0
        self._sequences = SequenceTable(
            vocabulary=self.model.vocabulary,
            pages=pool.kv.pages,
            page_tokens=self.page_tokens,
            positions=self.model.positions,
            sight=self.model.sight,
            start=self.model.spec.start,
            slots=slots,
            long_after=self.model.long_after,
        )
        return Grant(pool.kv.pages, granted, tuple(self._recorded.sizes if self._recorded else ()))

    def _captured(self, sequences: int) -> list[int]:
        """The numbers of rows to capture steps of: those asked for, as far as a step may have so many."""
        return sorted({min(size, sequences) for size in self._sizes})

    @torch.inference_mode()
    def _beside(self, step_tokens: int, sequences: int, adapters: int) -> int | None:
        """Bytes that are wanted beside pages, as the largest steps show; None where the device does not tell. Raises OutOfMemory."""
        model, sizes = self.model, self._captured(sequences)[-1:]

        def step() -> None:
            adapter = usual_adapter(model.linears, model.dtype, model.device.place)
            work, pool = largest(model, step_tokens, sequences, self.page_tokens, adapter), self._little_pool()
            self._read([work[0][1]], pool)
            self._choose(work, self._forward(work, pool))

        try:
            taken = model.device.peak_bytes(step)
            captures = model.device.peak_bytes(lambda: model.recorded(self._little_pool(), sizes))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            cure = "lower --max-batch-prefill-tokens or --max-batch-size, or quantize the model"
            raise OutOfMemory(
                f"a step of {step_tokens} tokens in {sequences} rows does not fit beside the weights: {error}; {cure}"
            ) from error
        if taken is None or captures is None:
            return None
        wanted = {"step_bytes": taken, "captured_bytes": captures, "adapter_bytes": adapters}
        log.info("measured what is wanted beside pages", extra={"fields": wanted})
        return sum(wanted.values())

    @torch.inference_mode()
    def step(self, step: Step) -> Outcome:
        """Run one turn. Raises ProtocolError when it breaks a rule, which every rank finds alike before it computes."""
        if self._sequences is None or self._pool is None:
            raise ProtocolError("a step came before any pages were reserved")
        if step.number != self._number + 1:
            raise ProtocolError(f"step {step.number} came after step {self._number}")
        self._number = step.number
        for number in step.release:
            self._sequences.release(number)
        begun = [self._sequences.admit(admit, self.adapters.get(admit.adapter)) for admit in step.admit]
        work = self._accept(step.rows, begun)
        began = time.perf_counter_ns()
        self._read(begun, self._pool)
        self._look(work)
        live = [item for item in work if not item[1].error]
        live = [live[index] for index in batches.by_adapter(live)]
        outcomes = {sequence.number: RowOutcome(sequence.number, error=sequence.error) for _, sequence in work if sequence.error}
        answered, sampling = self._answer(live)
        outcomes |= answered
        rows = [] if self._group.rank else [outcomes[row.sequence] for row in step.rows]
        return Outcome(step.number, rows, (time.perf_counter_ns() - began - sampling) // 1000, sampling // 1000)

    def _answer(self, live: list[Work]) -> tuple[dict[int, RowOutcome], int]:
        """Compute rows and choose their tokens, in two parts one after the other where memory is short; also ns of the choosing."""
        assert self._pool is not None
        pending = [sequence.pending_prompt for _, sequence in live]
        try:
            logits = self._forward(live, self._pool, self._recorded) if live else None
            computed = time.perf_counter_ns()
            return self._choose(live, logits), time.perf_counter_ns() - computed
        except Exception as error:
            parts = self._parts(live)
            if not parts or not is_out_of_memory(error):
                raise
            rows, tokens = len(live), sum(row.tokens for row, _ in live)
            log.warning(
                "memory was short for a step, which is computed in parts: %s", error, extra={"fields": {"rows": rows, "tokens": tokens}}
            )
        # Only now nothing holds the tensors of what failed.
        self.model.device.reclaim()
        for (_, sequence), prompt in zip(live, pending, strict=True):
            sequence.pending_prompt = prompt
        (first, before), (second, after) = (self._answer(part) for part in parts)
        for number in first.keys() & second.keys():
            second[number] = replace(second[number], prompt=[*first[number].prompt, *second[number].prompt])
        return first | second, before + after

    def _parts(self, live: list[Work]) -> list[list[Work]]:
        """Two halves of a step that may be computed again from its beginning, or none where there are none.

        Other ranks wait in a collective for what this one did not compute, and a recurrent state has moved on in some layers:
        then the epoch ends, and everything is replayed.
        """
        if self._group.world > 1 or self.model.slot_shapes:
            return []
        if len(live) > 1:
            return [live[: len(live) // 2], live[len(live) // 2 :]]
        cut = [(part, sequence) for row, sequence in live if sequence.images is None for part in _cut(row)]
        return [[item] for item in cut]

    def _forward(self, work: list[Work], pool: Pool, recorded: Recordings | None = None) -> Tensor | None:
        """The logits of rows, at least one; sequences that begin with a source have been read."""
        return self.model.forward(batches.build(work, self.page_tokens, self.adapters), pool, recorded)

    def _accept(self, rows: Items[Row], begun: Items[Sequence]) -> list[Work]:
        """Check a step's rows and sources against the limits, and rows against their sequences."""
        assert self._sequences is not None
        tokens = sum(row.tokens for row in rows) + sum(len(sequence.source.ids) for sequence in begun if sequence.source)
        most_tokens, most_rows = self._limits
        if tokens > most_tokens or len(rows) > most_rows:
            raise ProtocolError(f"a step has {tokens} tokens in {len(rows)} rows; {most_tokens} in {most_rows} were reserved")
        if len({row.sequence for row in rows}) < len(rows):
            raise ProtocolError("a step has two rows of one sequence")
        return [(row, self._sequences.advance(row)) for row in rows]

    def _read(self, begun: Items[Sequence], pool: Pool) -> None:
        """Have the encoder read the sources of new sequences, all at once."""
        sources = sorted((sequence for sequence in begun if sequence.source), key=lambda sequence: sequence.handle)
        if sources:
            self.model.encode(batches.read(sources, self.page_tokens, self.adapters), pool)

    def _look(self, work: list[Work]) -> None:
        """Encode the images that rows show or look at first. One that cannot be shown fails its sequence and no other."""
        assert self._pool is not None
        for row, sequence in work:
            if sequence.images is not None and not sequence.error:
                try:
                    for rows, slots in sequence.images.look(row.start, row.start + row.tokens, sequence.ids):
                        runs = [Run(0, len(rows), sequence.adapter)] if sequence.adapter else []
                        self.model.remember(rows, slots, self._pool, self.adapters.batch(runs))
                except ImageError as error:
                    sequence.error = f"bad_image: {error}"

    def _choose(self, live: list[Work], logits: Tensor | None) -> dict[int, RowOutcome]:
        """Sample on rank 0, tell every rank the ids, and take them into the sequences. Outcomes are full on rank 0 only."""
        chosen: list[TokenLogprob | None] = []
        prompts: dict[int, list[TokenLogprob]] = {}
        if logits is not None:
            prompts, sampled = self._judge(live, logits)
            chosen = sample(sampled, [choice for row, sequence in live for choice in _choices(row, sequence)], self.model.vocabulary_limit)
        picked = self._tell([FAILED if token is None else token.id for token in chosen], sum(_samples(row) for row, _ in live))
        outcomes, at = {}, 0
        for row, sequence in live:
            end = at + _samples(row)
            kept = _settle(row, sequence, picked[at:end])
            tokens = [token for token in chosen[at : at + kept] if token is not None]
            outcomes[sequence.number] = RowOutcome(sequence.number, tokens, prompts.get(sequence.number, ()), sequence.error)
            at = end
        return outcomes

    def _tell(self, ids: list[int], count: int) -> list[int]:
        """Rank 0's ids, on every rank."""
        if self._group.world == 1 or count == 0:
            return ids
        return self._group.broadcast(torch.tensor(ids or [FAILED] * count, dtype=torch.int64)).tolist()

    def _judge(self, live: list[Work], logits: Tensor) -> tuple[dict[int, list[TokenLogprob]], Tensor]:
        """Log-probabilities of the prompt tokens the rows computed, by sequence, and the logits that are left to sample from."""
        if not any(sequence.sampling.prompt_logprobs for _, sequence in live):
            return {}, logits
        prompts, sampled, at = {}, [], 0
        for row, sequence in live:
            count = judged(row, sequence)
            if sequence.sampling.prompt_logprobs:
                prompts[sequence.number] = _reported(row, sequence, logits[at : at + count])
            at += count
            sampled.append(logits[at : at + _samples(row)])
            at += _samples(row)
        return prompts, torch.cat(sampled)


def _cut(row: Row) -> list[Row]:
    """A row as two, the first of which samples nothing; none where it has but one token that is no guess."""
    known = row.tokens - len(row.drafts)
    if known < 2:
        return []
    half = known // 2
    return [replace(row, tokens=half, sample=False, drafts=()), replace(row, start=row.start + half, tokens=row.tokens - half)]


def _samples(row: Row) -> int:
    """How many tokens a row samples: one after each draft and one after the last known token."""
    return 1 + len(row.drafts) if row.sample else 0


def _choices(row: Row, sequence: Sequence) -> list[Choice]:
    """What the sampler must know for each token that the row samples: with drafts, as if those before it were accepted."""
    if not row.sample:
        return []
    ids = sequence.ids
    if not row.drafts:
        return [Choice(sequence.sampling, ids, sequence.prompt_tokens)]
    supposed = np.concatenate([ids, np.asarray(row.drafts, np.int64)])
    return [Choice(sequence.sampling, supposed[: len(ids) + count], sequence.prompt_tokens) for count in range(len(row.drafts) + 1)]


def _settle(row: Row, sequence: Sequence, picked: Items[int]) -> int:
    """Take a row's sampled ids into its sequence; how many of them count.

    A draft is accepted while it is what the sampler picked there anyway. Since a pick depends on position and ids alone,
    the answer is the one that single steps would have given.
    """
    end = row.start + row.tokens - len(row.drafts)
    accepted = 0
    while accepted < len(row.drafts) and picked[accepted] == row.drafts[accepted]:
        accepted += 1
    kept = min(accepted + 1, len(picked))
    sequence.computed = end + accepted
    if sequence.images is not None:
        sequence.images.forget(end)
    if FAILED in picked[:kept]:
        sequence.error = NAN_LOGITS
        return 0
    sequence.append(picked[:kept])
    return kept


def _reported(row: Row, sequence: Sequence, logits: Tensor) -> list[TokenLogprob]:
    """The row's own prompt tokens with their log-probabilities; that of the token after it waits for the row that computes it."""
    found = [sequence.pending_prompt] if sequence.pending_prompt else []
    sequence.pending_prompt = None
    for begin in range(0, len(logits), JUDGED_AT_ONCE):
        logprobs = torch.log_softmax(logits[begin : begin + JUDGED_AT_ONCE], dim=-1)
        first = row.start + 1 + begin
        ids = torch.from_numpy(sequence.ids[first : first + len(logprobs)]).to(logits.device)
        picked = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        tops = alternatives(logprobs, [sequence.sampling.top_logprobs] * len(picked))
        found += [TokenLogprob(token, logprob, top) for token, logprob, top in zip(ids.tolist(), picked, tops, strict=True)]
    if len(logits) == row.tokens:
        sequence.pending_prompt = found.pop()
    return found
