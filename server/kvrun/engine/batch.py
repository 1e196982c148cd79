"""From the rows of a step to the ragged tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch

from kvrun.engine.sequence import Row, Sequence
from kvrun.lora.table import AdapterTable, Run
from kvrun.nn.batch import ForwardBatch

Work = tuple[Row, Sequence]


def by_adapter(work: Items[Work]) -> list[int]:
    """The order that puts rows of one adapter beside each other, rows of the base model first."""
    return sorted(range(len(work)), key=lambda row: work[row][1].handle)


def build(work: Items[Work], page_tokens: int, adapters: AdapterTable) -> ForwardBatch:
    """Lay the rows' tokens end to end, in the order given. At least one row."""
    counts = np.fromiter((row.tokens for row, _ in work), np.int64, len(work))
    starts = np.fromiter((row.start for row, _ in work), np.int64, len(work))
    query_start: np.ndarray = np.zeros(len(work) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])

    page_table: np.ndarray = np.zeros((len(work), max(len(sequence.pages) for _, sequence in work)), np.int32)
    for row, (_, sequence) in enumerate(work):
        page_table[row, : len(sequence.pages)] = sequence.pages

    row_of: np.ndarray = np.repeat(np.arange(len(work)), counts)
    positions = np.arange(query_start[-1]) - np.repeat(query_start[:-1] - starts, counts)
    slots = page_table[row_of, positions // page_tokens] * page_tokens + positions % page_tokens
    return ForwardBatch(
        ids=torch.from_numpy(np.concatenate([_ids(row, sequence) for row, sequence in work])),
        positions=torch.from_numpy(positions.astype(np.int32)),
        query_start=torch.from_numpy(query_start),
        contexts=torch.from_numpy((starts + counts).astype(np.int32)),
        page_table=torch.from_numpy(page_table),
        slots=torch.from_numpy(slots.astype(np.int32)),
        wanted=torch.tensor(_wanted(work, query_start.tolist()), dtype=torch.int64),
        lora=adapters.batch(_runs(work, query_start.tolist())),
    )


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


def _runs(work: Items[Work], query_start: Items[int]) -> list[Run]:
    """One run for each stretch of adjacent rows with one adapter."""
    runs: list[Run] = []
    for index, (_, sequence) in enumerate(work):
        if sequence.adapter is None:
            continue
        start, stop = query_start[index], query_start[index + 1]
        if runs and runs[-1].stop == start and runs[-1].adapter is sequence.adapter:
            start = runs.pop().start
        runs.append(Run(start, stop, sequence.adapter))
    return runs
