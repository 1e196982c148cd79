"""One turn after another over a loaded model: release, admit, compute, choose. Every rank runs the same turns.

A turn may be launched while the one before is under way. Its layers then find on the device what was sampled, and the host learns
it between them and the sampling, which so knows every id. The one before is waited for sooner by a row that follows drafts, for
nobody knows where it starts, and by a row whose sequence has images to be read, which keeps the host for long. What cuts tokens off
(top-k, top-p, min-p, typical-p) waits within sampling for its own step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import kvrun_kernels
import torch
from torch import Tensor

from kvrun.dist import Group
from kvrun.engine import batch as batches
from kvrun.engine.batch import Work, judged
from kvrun.engine.memory import MemoryBudget
from kvrun.engine.pretended import largest, pretend
from kvrun.engine.sampler import FAILED, Scored, judge, sample
from kvrun.engine.sequence import Outcome, Row, Sequence, SequenceTable, Step
from kvrun.engine.turn import Chosen, Told, Turn, choices, samples
from kvrun.errors import ImageError, OutOfMemory, ProtocolError, is_out_of_memory
from kvrun.lora.adapter import targets
from kvrun.lora.fixed import usual_adapter
from kvrun.lora.placed import Room
from kvrun.lora.table import AdapterTable, Run
from kvrun.nn.loaded import LoadedModel
from kvrun.nn.recorded import Recordings
from kvrun.state.pages import stored_name, stored_type
from kvrun.state.pool import Pool
from kvrun.underway import Mark

T = TypeVar("T")
log = logging.getLogger("kvrun.engine")


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
        self.adapters = AdapterTable(model.linears, model.dtype, model.decoder.embed, model.device)
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
        self._open: Turn | None = None  # launched last; the host may not know its outcome yet

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of this rank, all layers."""
        return self.model.page_bytes(self.page_tokens, self.kv_dtype)

    @property
    def places_adapters(self) -> bool:
        """Whether adapters wait on the host and lie in pages while they are used: where the model has memory of its own, and pages."""
        return not self.model.device.shared and self.page_bytes > 0

    @property
    def kernels(self) -> dict[str, str]:
        """What serves each op for this model, and each kind of its layers that attends to pages of this format."""
        return self.model.kernels | self.model.decoder.attention.serving(self.kv_dtype)

    def warm(self) -> None:
        """Run the model over a few tokens and over one, so that no request pays for what is set up on first use of either.

        Every rank must call it alike.
        """
        model, pool = self.model, self._little_pool()
        for tokens, start in kvrun_kernels.first_steps(model.device.place.type):
            if 0 < model.positions < start + tokens:
                continue
            row, sequence = pretend(model, tokens, self.page_tokens, start)
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

    @torch.inference_mode()
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
            adapters = self._budget.adapters(adapter_bytes, self.places_adapters)
            beside = self._beside(step_tokens, sequences, 0 if self.places_adapters else adapters)
            useful = reach * sequences
            if useful and self.places_adapters:
                useful += adapters // self.page_bytes  # for all that may be loaded at once
            granted_pages = self._budget.pages(pages, self.page_bytes, useful, slots, self.model.slot_bytes, beside)
            self._pool = pool = self.model.pool(granted_pages, self.page_tokens, self.kv_dtype, slots)
            self._recorded = self.model.recorded(pool, self._captured(sequences))
            if self._recorded.sizes:
                log.info("decoding steps are captured", extra={"fields": {"rows": self._recorded.sizes}})
        granted = self._budget.adapters(adapter_bytes, self.places_adapters)
        self.adapters.reset(granted, Room(pool.kv.layers, pool.kv.pages) if self.places_adapters else None)
        self._open = None
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
            self._look(work, pool)
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

    def step(self, step: Step) -> Outcome:
        """Run one turn to its end. Raises ProtocolError when it breaks a rule, which every rank finds alike before it computes."""
        return self.launch(step).outcome()

    @torch.inference_mode()
    def launch(self, step: Step, tell: Callable[[], object] = lambda: None) -> Turn:
        """Begin one turn, whose outcome is told later. Raises ProtocolError when it breaks a rule.

        tell: called when the outcome of the turn before is to be taken, unless it was: where that is possible, when this one's
        layers are under way, and before its tokens are chosen.
        """
        if self._sequences is None or self._pool is None:
            raise ProtocolError("a step came before any pages were reserved")
        if step.number != self._number + 1:
            raise ProtocolError(f"step {step.number} came after step {self._number}")
        self._number = step.number
        for number in step.release:
            self._sequences.release(number)
        if step.displace or step.place:
            self.adapters.move(step.displace, [(place.adapter, place.first) for place in step.place], self._sequences.handles)
        begun = [self._sequences.admit(admit, self.adapters.get(admit.adapter)) for admit in step.admit]
        if self._must_know(step.rows):
            self._conclude(tell)
        work = self._accept(step, begun)
        began = self.model.device.mark()
        self._read(begun, self._pool)
        self._look(work, self._pool)
        live = [item for item in work if not item[1].is_lost(step.number)]
        lost = [sequence for _, sequence in work if sequence.is_lost(step.number)]
        parts = self._compute([live[index] for index in batches.by_adapter(live)], began, tell)
        self.adapters.settle()
        self._open = turn = Turn(step, lost, parts, self._group.rank)
        if turn.landed or len(parts) > 1:
            turn.outcome()
        return turn

    def _must_know(self, rows: Items[Row]) -> bool:
        """Whether rows cannot be laid out before the host knows what the turn before sampled, or keep it for long."""
        assert self._sequences is not None
        if self._open is None or self._open.over:
            return False
        drafted, images = self._open.drafted, [self._sequences.find(row).images for row in rows]
        return any(row.sequence in drafted for row in rows) or any(found is not None and found.busy for found in images)

    def _conclude(self, tell: Callable[[], object]) -> None:
        """Have the turn before be over."""
        if self._open is not None and not self._open.over:
            tell()
            self._open.outcome()

    def _compute(self, live: list[Work], began: Mark, tell: Callable[[], object] = lambda: None) -> list[Chosen]:
        """Compute rows and choose their tokens, in two parts one after the other where memory is short."""
        model, pool = self.model, self._pool
        assert pool is not None
        passed = self._unless_short(live, lambda: [self._forward(live, pool, self._recorded) if live else None])
        computed = model.device.mark()
        self._conclude(tell)
        # Taken out of the list, so that nothing holds the logits once choosing has failed.
        told = None if passed is None else self._unless_short(live, lambda: self._choose(live, passed.pop()))
        if told is None:
            return [chosen for part in self._parts(live) for chosen in self._compute(part, model.device.mark())]
        ids = told.sampled.ids if told.sampled else None
        chosen = model.device.mark()
        return [Chosen(live, ids, model.device.fetch(told), began, computed, chosen)]

    def _unless_short(self, live: list[Work], run: Callable[[], T]) -> T | None:
        """What `run` returns; None where memory was short for it and rows may be computed in parts."""
        try:
            return run()
        except Exception as error:
            if not self._parts(live) or not is_out_of_memory(error):
                raise
            rows, tokens = len(live), sum(row.tokens for row, _ in live)
            log.warning(
                "memory was short for a step, which is computed in parts: %s", error, extra={"fields": {"rows": rows, "tokens": tokens}}
            )
        # Only now nothing holds the tensors of what failed.
        self.model.device.reclaim()
        return None

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
        sampled = None if self._open is None else self._open.sampled
        return self.model.forward(batches.build(work, self.page_tokens, self.adapters, sampled), pool, recorded)

    def _accept(self, step: Step, begun: Items[Sequence]) -> list[Work]:
        """Check a step's rows and sources against the limits, and rows against their sequences."""
        assert self._sequences is not None
        rows = step.rows
        tokens = sum(row.tokens for row in rows) + sum(len(sequence.source.ids) for sequence in begun if sequence.source)
        most_tokens, most_rows = self._limits
        if tokens > most_tokens or len(rows) > most_rows:
            raise ProtocolError(f"a step has {tokens} tokens in {len(rows)} rows; {most_tokens} in {most_rows} were reserved")
        if len({row.sequence for row in rows}) < len(rows):
            raise ProtocolError("a step has two rows of one sequence")
        return [(row, self._sequences.advance(row, step.number)) for row in rows]

    def _read(self, begun: Items[Sequence], pool: Pool) -> None:
        """Have the encoder read the sources of new sequences, all at once."""
        sources = sorted((sequence for sequence in begun if sequence.source), key=lambda sequence: sequence.handle)
        if sources:
            self.model.encode(batches.read(sources, self.page_tokens, self.adapters), pool)

    def _look(self, work: list[Work], pool: Pool) -> None:
        """Encode the images that rows show or look at first. One that cannot be shown fails its sequence and no other."""
        for row, sequence in work:
            if sequence.images is not None and not sequence.is_lost(self._number):
                try:
                    for rows, slots in sequence.images.look(row.start, row.start + row.tokens, sequence.ids):
                        runs = [Run(0, len(rows), sequence.adapter)] if sequence.adapter else []
                        self.model.remember(rows, slots, pool, self.adapters.batch(runs))
                except ImageError as error:
                    sequence.fail(f"bad_image: {error}", self._number)

    def _choose(self, live: list[Work], logits: Tensor | None) -> Told:
        """Sample on rank 0 and tell every rank the ids, all of it where the model lies."""
        model, found, scored = self.model, None, None
        if logits is not None and any(sequence.sampling.prompt_logprobs for _, sequence in live):
            scored, logits = self._judge(live, logits)
        asked = [choice for row, sequence in live for choice in choices(row, sequence)]
        if asked:
            if logits is not None:
                found = sample(logits, asked, model.vocabulary_limit, model.device)
            else:
                found = Scored(torch.full((len(asked),), FAILED, dtype=torch.int64, device=model.device.place))
            self._group.broadcast(found.ids)
        return Told(found, scored)

    def _judge(self, live: list[Work], logits: Tensor) -> tuple[Scored, Tensor]:
        """Log-probabilities of the prompt tokens the rows computed, and the logits that are left to sample from."""
        pieces, ids, sampled, at = [], [], [], 0
        for row, sequence in live:
            count, first = judged(row, sequence), row.start + 1
            pieces.append((logits[at : at + count], sequence.sampling.top_logprobs))
            ids.append(sequence.ids[first : first + count])
            at += count
            sampled.append(logits[at : at + samples(row)])
            at += samples(row)
        return judge(pieces, ids, self.model.device), torch.cat(sampled)


def _cut(row: Row) -> list[Row]:
    """A row as two, the first of which samples nothing; none where it has but one token that is no guess."""
    known = row.tokens - len(row.drafts)
    if known < 2:
        return []
    half = known // 2
    return [replace(row, tokens=half, sample=False, drafts=()), replace(row, start=row.start + half, tokens=row.tokens - half)]
