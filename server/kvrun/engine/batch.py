"""From the rows of a step to the ragged tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvrun.engine import images
from kvrun.engine.images import Chunk, SequenceImages
from kvrun.engine.looked import LookedImages, looked_at
from kvrun.engine.sequence import Row, Sequence
from kvrun.lora.table import AdapterTable, Run
from kvrun.nn.batch import Fed, ForwardBatch, HostRows, MemoryRows, SlotRows

Work = tuple[Row, Sequence]


def by_adapter(work: Items[Work]) -> list[int]:
    """The order that puts rows of one adapter beside each other, rows of the base model first."""
    return sorted(range(len(work)), key=lambda row: work[row][1].handle)


def build(work: Items[Work], page_tokens: int, adapters: AdapterTable, sampled: torch.Tensor | None = None) -> ForwardBatch:
    """Lay the rows' tokens end to end, in the order given. At least one row. sampled: ids that sequences await, on the device"""
    counts = np.fromiter((row.tokens for row, _ in work), np.int64, len(work))
    starts = np.fromiter((row.start for row, _ in work), np.int64, len(work))
    sequences = [sequence for _, sequence in work]
    places = _places(starts, counts, [sequence.pages for sequence in sequences], page_tokens)
    begins = places.query_start.tolist()
    chunks = [
        Chunk(first, row.start, row.start + row.tokens, sequence.images)
        for (row, sequence), first in zip(work, begins)
        if isinstance(sequence.images, SequenceImages)
    ]
    spliced, reach = images.splice(chunks, places.positions) if chunks else (None, None)
    return ForwardBatch(
        ids=torch.from_numpy(np.concatenate([_ids(row, sequence) for row, sequence in work])),
        **places.tensors(),
        wanted=torch.tensor(_wanted(work, begins), dtype=torch.int64),
        lora=adapters.batch(_runs(sequences, begins)),
        long=_long(sequences, counts),
        splice=spliced,
        reach=reach,
        memory=_memory(sequences, counts) or _looked(work),
        recurrent=_recurrent(sequences, starts),
        fed=_fed(sequences, begins, sampled),
        host=HostRows(places.query_start, places.contexts, places.page_table),
    )


def read(sequences: Items[Sequence], page_tokens: int, adapters: AdapterTable) -> ForwardBatch:
    """Lay the sources of sequences end to end, in the order given, for an encoder. At least one."""
    sources = [sequence.source for sequence in sequences if sequence.source is not None]
    counts = np.fromiter((len(source.ids) for source in sources), np.int64, len(sources))
    places = _places(np.zeros_like(counts), counts, [source.pages for source in sources], page_tokens)
    return ForwardBatch(
        ids=torch.from_numpy(np.concatenate([source.ids for source in sources])),
        **places.tensors(),
        wanted=torch.empty(0, dtype=torch.int64),
        lora=adapters.batch(_runs(sequences, places.query_start.tolist())),
        reach=_int32(np.repeat(counts - 1, counts)),
    )


@dataclass(frozen=True)
class _Places:
    """Where rows and their tokens lie, by the names of ForwardBatch."""

    query_start: np.ndarray
    positions: np.ndarray
    contexts: np.ndarray
    page_table: np.ndarray
    slots: np.ndarray

    def tensors(self) -> dict[str, Any]:
        return {name: torch.from_numpy(array) for name, array in vars(self).items()}


def _places(starts: np.ndarray, counts: np.ndarray, pages: Items[np.ndarray], page_tokens: int) -> _Places:
    query_start: np.ndarray = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    page_table = _table(pages)
    row_of: np.ndarray = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(query_start[-1]) - np.repeat(query_start[:-1] - starts, counts)
    slots = page_table[row_of, positions // page_tokens] * page_tokens + positions % page_tokens
    contexts = (starts + counts).astype(np.int32)
    return _Places(query_start, positions.astype(np.int32), contexts, page_table, slots.astype(np.int32))


def _table(pages: Items[np.ndarray]) -> np.ndarray:
    table: np.ndarray = np.zeros((len(pages), max(map(len, pages))), np.int32)
    for row, held in enumerate(pages):
        table[row, : len(held)] = held
    return table


def _memory(sequences: Items[Sequence], counts: np.ndarray) -> MemoryRows | None:
    sources = [sequence.source for sequence in sequences if sequence.source is not None]
    if not sources:
        return None
    contexts = np.fromiter((len(source.ids) for source in sources), np.int32, len(sources))
    table = torch.from_numpy(_table([source.pages for source in sources]))
    return MemoryRows(torch.from_numpy(contexts), table, _int32(np.repeat(contexts - 1, counts)))


def _looked(work: Items[Work]) -> MemoryRows | None:
    parts = [
        (row.start, row.start + row.tokens, sequence.ids, sequence.images)
        for row, sequence in work
        if isinstance(sequence.images, LookedImages)
    ]
    return looked_at(parts) if parts else None


def _recurrent(sequences: Items[Sequence], starts: np.ndarray) -> SlotRows | None:
    slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
    return SlotRows(torch.tensor(slots, dtype=torch.int32), torch.from_numpy(starts == 0)) if slots else None


def _fed(sequences: Items[Sequence], query_start: Items[int], sampled: torch.Tensor | None) -> Fed | None:
    """The ids that sequences await. Each is its row's only token: all before it were computed when it was sampled."""
    fed = [(begin, sequence.awaited) for begin, sequence in zip(query_start, sequences) if sequence.awaited is not None]
    if not fed or sampled is None:
        return None
    tokens, rows = torch.tensor(fed, dtype=torch.int64).unbind(1)
    return Fed(tokens.contiguous(), rows.contiguous(), sampled)


def _long(sequences: Items[Sequence], counts: np.ndarray) -> torch.Tensor | None:
    long = np.fromiter((sequence.long for sequence in sequences), bool, len(sequences))
    return torch.from_numpy(np.repeat(long, counts)) if long.any() else None


def _int32(numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.int32))


def judged(row: Row, sequence: Sequence) -> int:
    """How many of the row's first tokens are followed by a prompt token whose log-probability was asked for."""
    if not sequence.sampling.prompt_logprobs:
        return 0
    return max(0, min(row.tokens, sequence.prompt_tokens - 1 - row.start))


def _wanted(work: Items[Work], query_start: Items[int]) -> list[int]:
    """The tokens whose logits are wanted: of each row the judged ones, then those to sample after."""
    found: list[int] = []
    for (row, sequence), begin, end in zip(work, query_start, query_start[1:]):
        if sequence.sampling.prompt_logprobs:
            found.extend(range(begin, begin + judged(row, sequence)))
        if row.sample:
            found.extend(range(end - 1 - len(row.drafts), end))
    return found


def _ids(row: Row, sequence: Sequence) -> np.ndarray:
    known = sequence.ids[row.start : row.start + row.tokens]
    return np.concatenate([known, np.asarray(row.drafts, np.int64)]) if row.drafts else known


def _runs(sequences: Items[Sequence], query_start: Items[int]) -> list[Run]:
    """One run for each stretch of adjacent rows with one adapter."""
    runs: list[Run] = []
    for index, sequence in enumerate(sequences):
        if sequence.adapter is None:
            continue
        start, stop = query_start[index], query_start[index + 1]
        if runs and runs[-1].stop == start and runs[-1].adapter is sequence.adapter:
            start = runs.pop().start
        runs.append(Run(start, stop, sequence.adapter))
    return runs
