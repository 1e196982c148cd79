"""Chooses the next token of many rows with different settings in one pass.

What a row gets depends on its own logits, ids, settings and position, bit for bit, never on the rows beside it: every
reduction runs along one row in one order, and elementwise arithmetic uses only operations that IEEE 754 rounds exactly.

What rows ask for is carried to the logits in one copy, and what was chosen stays where they lie: `Scored` is read when it has been
fetched. Only draws that cut tokens off look at numbers in between, and wait for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvrun.device import Device
from kvrun.engine.sampling import MOST_ALTERNATIVES, Sampling, TokenLogprob, uniforms

# Truncations look at this many of the likeliest tokens first; rows that keep more are sorted whole.
CANDIDATES = 256
# Below it every draw is the most likely token already, and the quotient may overflow.
COLDEST = 1e-6
# Prompt tokens judged in one go: a whole chunk of them over a large vocabulary would double the memory of its logits.
JUDGED_AT_ONCE = 64

FAILED = -1  # in place of a sampled id


@dataclass(frozen=True, slots=True)
class Choice:
    """One token to choose: the settings of its sequence and the ids before it."""

    sampling: Sampling
    ids: np.ndarray  # int64, prompt and answer so far; the token to choose gets position len(ids)
    prompt_tokens: int  # how many of them are prompt


@dataclass(frozen=True)
class Likeliest:
    """The tokens that were likeliest in some places, in no order among equals."""

    ids: Tensor  # [A, K] int64
    logprobs: Tensor  # [A, K] float32


@dataclass(frozen=True)
class Scored:
    """Tokens and how likely each was."""

    ids: Tensor  # [N] int64, FAILED where the logits are not finite numbers
    logprobs: Tensor | None = None  # [N] float32; None on ranks that are told the ids only
    top: Likeliest | None = None  # in those places where alternatives are asked for, in their order; None = nowhere

    def tokens(self, alternatives: Sequence[int]) -> list[TokenLogprob | None]:
        """The tokens, each with so many alternatives, of equal ones the lower id first; None for one that failed. Read by the host."""
        assert self.logprobs is not None, "only rank 0 knows more of tokens than their ids"
        tops: Iterable[tuple[list[int], list[float]]] = ()
        if self.top is not None:
            tops = zip(self.top.ids.tolist(), self.top.logprobs.tolist(), strict=True)
        tops, found = iter(tops), list[TokenLogprob | None]()
        for token, logprob, count in zip(self.ids.tolist(), self.logprobs.tolist(), alternatives, strict=True):
            top: list[tuple[int, float]] = []
            if count:
                top = sorted(zip(*next(tops), strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]
            found.append(None if token == FAILED else TokenLogprob(token, logprob, top))
        return found


@dataclass(frozen=True)
class _Change:
    """Numbers at some places of the logits."""

    rows: Tensor  # [M] int64
    ids: Tensor  # [M] int64
    numbers: Tensor  # [M] float32


@dataclass(frozen=True)
class Adjustments:
    """What changes logits before anything else, in this order."""

    repeated: _Change | None  # repetition penalties
    counted: _Change | None  # frequency and presence penalties, added as they are
    biased: _Change | None  # added
    suppressed: _Change | None  # minus infinity, added

    @classmethod
    def of(cls, choices: Sequence[Choice], limit: int) -> Adjustments:
        """What these rows ask for below the id `limit`."""
        repeated, counted, biased, suppressed = [], [], [], []
        for row, choice in enumerate(choices):
            s = choice.sampling
            if not s.adjusts:
                continue
            answer = choice.ids[choice.prompt_tokens :]
            if s.repetition_penalty != 1.0:
                repeated.append((row, choice.ids, np.float32(s.repetition_penalty)))
            if s.frequency_penalty or s.presence_penalty:
                seen, counts = np.unique(answer, return_counts=True)
                penalties = counts.astype(np.float32) * np.float32(s.frequency_penalty) + np.float32(s.presence_penalty)
                counted.append((row, seen, -penalties))
            if s.logit_bias:
                keys = np.fromiter(s.logit_bias.keys(), np.int64, len(s.logit_bias))
                biased.append((row, keys, np.fromiter(s.logit_bias.values(), np.float32, len(s.logit_bias))))
            if len(answer) < s.suppressed_until:
                suppressed.append((row, np.asarray(s.suppressed, np.int64), np.float32(-np.inf)))
        return cls(*(_changed(entries, limit) for entries in (repeated, counted, biased, suppressed)))


@dataclass(frozen=True)
class _Draws:
    """Rows that are drawn, in their order."""

    rows: Tensor  # [D] int64
    temperatures: Tensor  # [D] float32
    where: Tensor  # [D] float64, where in its distribution each draw falls
    cut: Tensor | None  # int64, those of the D that cut tokens off; None for none

    @classmethod
    def of(cls, rows: list[int], choices: Sequence[Choice]) -> _Draws:
        settings = [choices[row].sampling for row in rows]
        seeds = np.array([s.seed for s in settings], dtype=np.uint64)
        positions = np.array([len(choices[row].ids) for row in rows], dtype=np.uint64)
        return cls(
            _int64(rows),
            torch.tensor([max(s.temperature, COLDEST) for s in settings], dtype=torch.float32),
            torch.from_numpy(uniforms(seeds, positions)),
            _some([row for row, s in enumerate(settings) if s.truncates]),
        )


@dataclass(frozen=True)
class _Asked:
    """What rows ask for, as tensors; None for what none does."""

    adjustments: Adjustments | None
    draws: _Draws | None
    alternatives: Tensor | None  # [A] int64, rows that ask for alternatives

    @classmethod
    def of(cls, choices: Sequence[Choice], limit: int) -> _Asked:
        drawn = [row for row, choice in enumerate(choices) if not choice.sampling.greedy]
        return cls(
            Adjustments.of(choices, limit) if any(choice.sampling.adjusts for choice in choices) else None,
            _Draws.of(drawn, choices) if drawn else None,
            _some([row for row, choice in enumerate(choices) if choice.sampling.top_logprobs]),
        )


def sample(logits: Tensor, choices: Sequence[Choice], limit: int, device: Device) -> Scored:
    """The token chosen for each row, at least one, where the logits lie.

    logits [rows, vocabulary] float32, on `device`, changed in place · ids at or above `limit` are never chosen.
    """
    logits = logits[:, :limit]
    asked = device.take(_Asked.of(choices, limit))
    if asked.adjustments is not None:
        adjust(logits, asked.adjustments)
    logprobs = torch.log_softmax(logits, dim=-1)
    # From the logits: two different logits may round to one log-probability.
    ids = logits.argmax(dim=-1)
    if (draws := asked.draws) is not None:
        drawn = [choice.sampling for choice in choices if not choice.sampling.greedy]
        mixed = len(drawn) < len(choices)
        ids[draws.rows] = draw(logits[draws.rows] if mixed else logits, drawn, draws)
        ids.clamp_(min=0)
    asking = None
    if (rows := asked.alternatives) is not None:
        asking = logprobs if len(rows) == len(logprobs) else logprobs[rows]
    picked, top = _scored(logprobs, ids, asking)
    # A NaN or +inf anywhere in a row makes its normaliser, and so every log-probability of it, a NaN.
    return Scored(ids.masked_fill_(picked.isnan(), FAILED), picked, top)


def judge(pieces: Sequence[tuple[Tensor, int]], ids: Sequence[np.ndarray], device: Device) -> Scored:
    """How likely tokens that are known were.

    pieces: of each row its logits [n, vocabulary] and how many alternatives it asks for · ids: of each row the n tokens, int64
    """
    known = device.take(_Known(torch.from_numpy(np.concatenate([*ids, np.empty(0, np.int64)])))).ids
    picked, tops, begin = [known[:0].float()], list[Likeliest](), 0
    for logits, alternatives in pieces:
        for some in logits.split(JUDGED_AT_ONCE) if len(logits) else ():
            logprobs, end = torch.log_softmax(some, dim=-1), begin + len(some)
            found, top = _scored(logprobs, known[begin:end], logprobs if alternatives else None)
            picked.append(found)
            tops += [top] if top else []
            begin = end
    likeliest = Likeliest(torch.cat([top.ids for top in tops]), torch.cat([top.logprobs for top in tops])) if tops else None
    return Scored(known, torch.cat(picked), likeliest)


@dataclass(frozen=True)
class _Known:
    ids: Tensor


def _scored(logprobs: Tensor, ids: Tensor, asking: Tensor | None) -> tuple[Tensor, Likeliest | None]:
    """The log-probabilities of tokens, and what was likeliest in the rows that ask. logprobs [N, vocabulary], ids [N]"""
    picked = logprobs.gather(1, ids[:, None])[:, 0]
    if asking is None:
        return picked, None
    # As many for every row: which of equal ones are among them shall not depend on what others ask for.
    values, top = torch.topk(asking, min(MOST_ALTERNATIVES, asking.shape[1]))
    return picked, Likeliest(top, values)


def adjust(logits: Tensor, adjustments: Adjustments) -> None:
    """Apply adjustments in place."""
    if (change := adjustments.repeated) is not None:
        found = logits[change.rows, change.ids]
        logits[change.rows, change.ids] = torch.where(found < 0, found * change.numbers, found / change.numbers)
    for change in (adjustments.counted, adjustments.biased, adjustments.suppressed):
        if change is not None:
            logits[change.rows, change.ids] = logits[change.rows, change.ids] + change.numbers


def _changed(entries: list[tuple[int, np.ndarray, np.ndarray | np.float32]], limit: int) -> _Change | None:
    """Lay (row, ids, numbers) entries end to end, without ids past the limit; None for none."""
    if not entries:
        return None
    rows = np.concatenate([np.full(len(ids), row) for row, ids, _ in entries])
    ids = np.concatenate([ids for _, ids, _ in entries])
    numbers = np.concatenate([np.broadcast_to(numbers, len(ids)) for _, ids, numbers in entries])
    inside = ids < limit
    return _Change(*(torch.from_numpy(array[inside]) for array in (rows, ids, numbers)))


def _int64(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def _some(rows: list[int]) -> Tensor | None:
    return _int64(rows) if rows else None


def draw(logits: Tensor, settings: Sequence[Sampling], draws: _Draws) -> Tensor:
    """Draw one id per row from its tempered and truncated distribution. logits [rows, vocabulary] -> [rows] int64

    Only rows that truncate make anybody wait. A row that is not finite gets any id, or -1.
    """
    probabilities, where, cut = torch.softmax(logits / draws.temperatures[:, None], dim=-1), draws.where, draws.cut
    ids = torch.full((len(settings),), -1, dtype=torch.int64, device=logits.device)
    wide = list(range(len(settings)))
    if cut is not None:
        ids[cut] = _draw_near(probabilities[cut], [s for s in settings if s.truncates], where[cut])
        wide = ((ids < 0) & probabilities[:, 0].isfinite()).nonzero()[:, 0].tolist()
    for row in wide:
        ids[row] = _draw_wide(probabilities[row], settings[row], where[row : row + 1])
    return ids


def _draw_near(probabilities: Tensor, settings: Sequence[Sampling], where: Tensor) -> Tensor:
    """Draw where a row's likeliest tokens hold all that its truncations keep; -1 in the rows where they do not."""
    width = min(probabilities.shape[1], max(CANDIDATES, 2 * max(s.top_k for s in settings)))
    likeliest, tokens = torch.topk(probabilities, width)
    low, high = bounds(likeliest, settings, whole=width == probabilities.shape[1])
    # In order of id, as over the whole vocabulary: the zeros between them would not change the sums.
    tokens, order = tokens.sort(dim=-1)
    ids = tokens.gather(1, invert(_within(likeliest.gather(1, order), low, high), where)[:, None])[:, 0]
    return torch.where(torch.isfinite(low), ids, -1)


def _draw_wide(probabilities: Tensor, settings: Sampling, where: Tensor) -> Tensor:
    """Draw from one row over the whole vocabulary. One at a time: the sums of one row fit the cache, those of many do not."""
    kept = probabilities[None]
    if settings.truncates:
        low, high = bounds(_candidates(probabilities, settings)[None], [settings], whole=True)
        kept = _within(kept, low, high)
    return invert(kept, where)[0]


def _candidates(probabilities: Tensor, s: Sampling) -> Tensor:
    """Every probability that may survive, descending: without those that top-p or min-p will certainly cut."""
    floor = 0.0
    if not s.top_k:  # top-p takes its share of what top-k left, which only the whole row can tell
        # Tokens below this share each hold, all together, less than what top-p cuts off. Half of it, for rounding.
        floor = max(0.5 * (1.0 - s.top_p) / len(probabilities), 0.5 * s.min_p * float(probabilities.max()))
    kept = probabilities.cpu().numpy()
    return torch.from_numpy(np.sort(kept[kept >= floor])[::-1].copy()).to(probabilities.device)


def bounds(likeliest: Tensor, settings: Sequence[Sampling], *, whole: bool) -> tuple[Tensor, Tensor]:
    """The least and the greatest probability that survive top-k, top-p, min-p and typical-p, applied in that order.

    likeliest [rows, n]: the greatest probabilities of each row, descending -> two [rows]. Unless these are the `whole` of
    what may survive, the least is infinite in rows where all of them do. Each truncation works on what the one before it
    left, scaled to sum to 1.
    """
    n = likeliest.shape[1]
    low = likeliest.new_zeros(len(settings))
    high = likeliest[:, 0].clone()
    if any(s.top_k for s in settings):
        last = torch.tensor([min(s.top_k or n, n) - 1 for s in settings], device=low.device)
        low = torch.where(torch.tensor([s.top_k > 0 for s in settings], device=low.device), likeliest.gather(1, last[:, None])[:, 0], low)
    if any(s.top_p < 1.0 for s in settings):
        top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=low.device)
        kept = torch.where(likeliest >= low[:, None], likeliest, 0).to(torch.float64)
        mass = kept.cumsum(dim=-1)
        total = torch.where(low > 0, mass[:, -1], 1.0)
        # A token stays while those likelier than it hold less than top-p of the mass; so the first always does.
        last = ((mass - kept < (top_p * total)[:, None]) & (kept > 0)).sum(dim=-1) - 1
        least = likeliest.gather(1, last.clamp(min=0)[:, None])[:, 0]
        low = torch.where(top_p < 1.0, torch.maximum(low, least), low)
    if any(s.min_p > 0.0 for s in settings):
        low = torch.maximum(low, likeliest.new_tensor([s.min_p for s in settings]) * likeliest[:, 0])
    if not whole:
        low[likeliest[:, -1] >= low] = torch.inf
    for row, s in enumerate(settings):
        # The greatest is not finite where logits are not.
        if s.typical_p < 1.0 and torch.isfinite(low[row]) and torch.isfinite(high[row]):
            low[row], high[row] = _typical(likeliest[row], low[row], s.typical_p)
    return low, high


def _typical(likeliest: Tensor, low: Tensor, typical_p: float) -> tuple[float, float]:
    """The bounds of the tokens whose surprise is nearest the expected one, taken until they hold `typical_p` of the mass."""
    kept = likeliest[(likeliest >= low) & (likeliest > 0)].cpu().numpy().astype(np.float64)
    p = kept / kept.sum()
    surprise = -np.log(p)
    distance = np.abs(surprise - (p * surprise).sum())
    order = np.argsort(distance, kind="stable")
    enough = min(int((p[order].cumsum() < typical_p).sum()), len(p) - 1)
    typical = kept[distance <= distance[order[enough]]]
    return float(typical.min()), float(typical.max())


def _within(probabilities: Tensor, low: Tensor, high: Tensor) -> Tensor:
    keep = (probabilities >= low[:, None]) & (probabilities <= high[:, None])
    return torch.where(keep, probabilities, 0)


def invert(weights: Tensor, where: Tensor) -> Tensor:
    """The index at which the running sum of each row's weights passes `where` of their total.

    weights [rows, n] >= 0, where [rows] in [0, 1) -> [rows] int64. An index of no weight is never returned.
    """
    mass = weights.cumsum(dim=-1, dtype=torch.float64)
    total = mass[:, -1]
    # Rounding may carry the product up to the total itself, which no running sum passes.
    target = torch.minimum(where * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, target[:, None], right=True)[:, 0].clamp(max=weights.shape[1] - 1)
