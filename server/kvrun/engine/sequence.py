"""The records of the sequences this shard knows. The router decides their life; a record only says what is true of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvrun.engine.images import Image, SequenceImages
from kvrun.engine.looked import LookedImages
from kvrun.engine.sampling import Sampling, TokenLogprob
from kvrun.engine.source import Source
from kvrun.errors import ProtocolError

if TYPE_CHECKING:
    from kvrun.lora.adapter import Adapter
    from kvrun.nn.vision.sight import Sight


@dataclass(frozen=True, slots=True)
class Admit:
    """A sequence to begin, or to begin again with the answer it already has."""

    sequence: int
    tokens: Items[int]  # prompt, then committed answer
    prompt_tokens: int
    sampling: Sampling
    adapter: int  # handle, 0 = the base model
    images: Items[Image] = ()  # in the order of their places
    memory_tokens: Items[int] = ()  # the source that an encoder reads
    memory_pages: Items[int] = ()
    long: bool = False  # it may come to more tokens than the model's `long_after`


@dataclass(frozen=True, slots=True)
class Row:
    """How much of one sequence a step computes."""

    sequence: int
    start: int
    tokens: int
    pages: Items[int]  # appended to the sequence's table
    sample: bool
    drafts: Items[int]  # guesses at the next tokens, counted by `tokens`


@dataclass(frozen=True, slots=True)
class Placement:
    """An adapter by its handle, and the lowest of the adjacent pages that it is brought into."""

    adapter: int
    first: int


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the engine: release, then displace, then place, then admit, then compute rows."""

    number: int
    release: Items[int]
    admit: Items[Admit]
    rows: Items[Row]
    displace: Items[int] = ()  # handles of adapters that leave their pages
    place: Items[Placement] = ()  # adapters that come into pages


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What a row produced, or why it failed."""

    sequence: int
    tokens: Items[TokenLogprob] = ()
    prompt: Items[TokenLogprob] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step's answer, its rows in the step's order; empty on ranks other than 0."""

    number: int
    rows: Items[RowOutcome]
    forward_us: int
    sample_us: int


class _Growing:
    """An integer array that is appended to."""

    __slots__ = ("_items", "_size")

    def __init__(self, items: Items[int], dtype: type) -> None:
        self._size = len(items)
        self._items: np.ndarray = np.empty(max(16, self._size + self._size // 2), dtype)
        self._items[: self._size] = items

    def __len__(self) -> int:
        return self._size

    @property
    def view(self) -> np.ndarray:
        """The items so far, without a copy; stale after the next `extend`."""
        return self._items[: self._size]

    def extend(self, items: Items[int]) -> None:
        end = self._size + len(items)
        if end > len(self._items):
            grown = np.empty(2 * end, self._items.dtype)
            grown[: self._size] = self.view
            self._items = grown
        self._items[self._size : end] = items
        self._size = end


class Sequence:
    """One sequence: the ids known, how many of them lie in its pages, and how its next token is chosen."""

    __slots__ = (
        "_ids",
        "_pages",
        "adapter",
        "awaited",
        "computed",
        "error",
        "handle",
        "images",
        "long",
        "lost",
        "number",
        "pending_prompt",
        "prompt_tokens",
        "sampling",
        "slot",
        "source",
    )

    def __init__(self, admit: Admit, adapter: Adapter | None, images: SequenceImages | LookedImages | None = None) -> None:
        self.number = admit.sequence
        self.prompt_tokens = admit.prompt_tokens
        self.sampling = admit.sampling
        self.handle = admit.adapter
        self.adapter = adapter  # held, so that unloading it never touches a sequence that began with it
        self.images = images  # None: it has none
        self.long = admit.long
        self.source: Source | None = None  # of a model with an encoder
        self.slot: int | None = None  # of a model that carries a state along
        self.computed: int | None = None  # None until the first row says how much its pages hold already
        self.error = ""  # once set, every later row of this sequence fails with it
        self.lost: int | None = None  # the first step that does not compute its rows any more
        # Where, among the ids that the step before samples, this sequence's last id is, while the host does not know it.
        self.awaited: int | None = None
        # The prompt token after the last chunk, judged by that chunk's logits, reported with the row that computes it.
        self.pending_prompt: TokenLogprob | None = None
        self._ids = _Growing(admit.tokens, np.int64)
        self._pages = _Growing((), np.int32)

    @property
    def ids(self) -> np.ndarray:
        """Prompt and answer ids, int64; stale after the next `append`."""
        return self._ids.view

    @property
    def pages(self) -> np.ndarray:
        """The page table, int32, in order of position."""
        return self._pages.view

    def append(self, ids: Items[int]) -> None:
        """Take sampled ids into the answer."""
        self._ids.extend(ids)

    def expect(self, at: int) -> None:
        """Take an id into the answer that only the device knows, as number `at` of its step; 0 stands for it until `learn`."""
        self._ids.extend([0])
        self.awaited = at

    def learn(self, token: int) -> None:
        """Say what the expected id is."""
        self.ids[-1] = token
        self.awaited = None

    def fail(self, error: str, lost: int) -> None:
        """Have every later row fail, and none be computed from step `lost` on. Every rank must name the same step."""
        self.error, self.lost = error, lost

    def is_lost(self, step: int) -> bool:
        """Whether a step computes none of its rows."""
        return self.lost is not None and step >= self.lost

    def append_pages(self, pages: Items[int]) -> None:
        """Grow the page table."""
        self._pages.extend(pages)


class SequenceTable:
    """The sequences of an epoch, by number, and the rules that steps must keep about them."""

    def __init__(
        self,
        *,
        vocabulary: int,
        pages: int,
        page_tokens: int,
        positions: int,
        sight: Sight | None = None,
        start: int | None = None,
        slots: int = 0,
        long_after: int = 0,
    ) -> None:
        self._sequences: dict[int, Sequence] = {}
        self._vocabulary = vocabulary
        self._pages = pages
        self._page_tokens = page_tokens
        self._positions = positions  # 0 = no limit
        self._long_after = long_after  # 0 = no sequence is long
        self._sight = sight  # None: no images are taken
        self._start = start  # the id that answers begin with after a source; None: sources are not taken
        self._recurrent = slots > 0
        self._slots = list(range(slots))  # free ones; the lowest goes first, so that memory no sequence ever used stays untouched

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def handles(self) -> set[int]:
        """Of the adapters that sequences use."""
        return {sequence.handle for sequence in self._sequences.values()}

    def release(self, number: int) -> None:
        """Forget a sequence; one that was never admitted is forgotten already."""
        sequence = self._sequences.pop(number, None)
        if sequence is not None and sequence.slot is not None:
            heapq.heappush(self._slots, sequence.slot)

    def admit(self, admit: Admit, adapter: Adapter | None) -> Sequence:
        """Begin a sequence with the adapter that its handle stands for. Raises ProtocolError."""
        who = f"admit of sequence {admit.sequence}"
        if admit.sequence in self._sequences:
            raise ProtocolError(f"{who}: it is admitted already; release it first")
        if not 0 < admit.prompt_tokens <= len(admit.tokens):
            raise ProtocolError(
                f"{who}: {admit.prompt_tokens} of its {len(admit.tokens)} tokens are prompt; at least 1 and at most all must be"
            )
        largest = max(max(admit.tokens), admit.sampling.largest_id())
        if largest >= self._vocabulary:
            raise ProtocolError(f"{who}: token id {largest} is not below the vocabulary of {self._vocabulary}")
        try:
            sequence = Sequence(admit, adapter, self._images(admit))
            sequence.source = self._source(admit)
        except ProtocolError as error:
            raise ProtocolError(f"{who}: {error}") from error
        if self._recurrent:
            if not self._slots:
                raise ProtocolError(f"{who}: every slot is taken; as many were reserved as rows of one step")
            sequence.slot = heapq.heappop(self._slots)
        self._sequences[admit.sequence] = sequence
        return sequence

    def _images(self, admit: Admit) -> SequenceImages | LookedImages | None:
        if self._sight is not None and self._sight.spec.memory:
            if max(admit.memory_pages, default=0) >= self._pages:
                raise ProtocolError(f"memory page {max(admit.memory_pages)} is not below the {self._pages} reserved")
            return LookedImages(admit.images, self._sight, admit.prompt_tokens, admit.memory_pages, self._page_tokens)
        return SequenceImages(admit.images, self._sight, admit.prompt_tokens) if admit.images else None

    def _source(self, admit: Admit) -> Source | None:
        if self._start is None:
            if admit.memory_tokens:
                raise ProtocolError("it has a source, and this model has no encoder")
            return None
        if admit.tokens[0] != self._start:
            raise ProtocolError(f"it begins with token {admit.tokens[0]}; answers of this model begin with {self._start}")
        return Source.of(admit.memory_tokens, admit.memory_pages, self._vocabulary, self._pages, self._page_tokens)

    def find(self, row: Row) -> Sequence:
        """The sequence of a row. Raises ProtocolError."""
        sequence = self._sequences.get(row.sequence)
        if sequence is None:
            raise ProtocolError(f"row of sequence {row.sequence}: it was never admitted, or was released")
        return sequence

    def advance(self, row: Row, step: int) -> Sequence:
        """Check one row of a step against its sequence, give it its pages, and return the sequence. Raises ProtocolError."""
        sequence = self.find(row)
        if sequence.is_lost(step):
            return sequence
        if sequence.computed is None:
            if row.start and self._recurrent:
                self._refuse(row, f"it starts at {row.start}, where no state is kept that it could go on from")
            sequence.computed = row.start
        known, end, drafts = len(sequence.ids), row.start + row.tokens, len(row.drafts)
        if row.start != sequence.computed:
            self._refuse(row, f"it starts at {row.start}, but {sequence.computed} tokens are computed")
        if row.tokens < 1 or end - drafts > known:
            self._refuse(row, f"it computes up to token {end - drafts}, but {known} are known and a row has at least one")
        if row.sample and end - drafts != known:
            self._refuse(row, f"it samples after token {end - drafts}, but {known} are known")
        if drafts and (not row.sample or row.tokens <= drafts or max(row.drafts) >= self._vocabulary):
            self._refuse(row, f"its {drafts} drafts need sample=true, a known token before them and ids below {self._vocabulary}")
        if drafts and self._recurrent:
            self._refuse(row, f"its {drafts} drafts could not be taken back from a recurrent state")
        if self._positions and end > self._positions:
            self._refuse(row, f"it reaches position {end}, past the model's {self._positions}")
        if 0 < self._long_after < end and not sequence.long:
            self._refuse(row, f"it reaches position {end}, past {self._long_after}, and was not admitted as long")
        if row.pages:
            if max(row.pages) >= self._pages:
                self._refuse(row, f"page {max(row.pages)} is not below the {self._pages} reserved")
            sequence.append_pages(row.pages)
        if end > len(sequence.pages) * self._page_tokens:
            self._refuse(row, f"it reaches token {end}, but its {len(sequence.pages)} pages hold {self._page_tokens} tokens each")
        return sequence

    def _refuse(self, row: Row, why: str) -> None:
        raise ProtocolError(f"row of sequence {row.sequence}: {why}")
