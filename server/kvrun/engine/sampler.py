"""Chooses the next token of many rows with different settings in one pass.

What a row gets depends on its own logits, ids, settings and position, bit for bit, never on the rows beside it: every
reduction runs along one row in one order, and elementwise arithmetic uses only operations that IEEE 754 rounds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvrun.engine.sampling import Sampling, uniforms

# Truncations look at this many of the likeliest tokens first; rows that keep more are sorted whole.
CANDIDATES = 256
# Below it every draw is the most likely token already, and the quotient may overflow.
COLDEST = 1e-6


@dataclass(frozen=True, slots=True)
class Choice:
    """One token to choose: the settings of its sequence and the ids before it."""

    sampling: Sampling
    ids: np.ndarray  # int64, prompt and answer so far; the token to choose gets position len(ids)
    prompt_tokens: int  # how many of them are prompt


@dataclass(frozen=True, slots=True)
class Chosen:
    """The token chosen, with log-probabilities before temperature and truncation, after penalties and bias."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()  # most likely first


def sample(logits: Tensor, choices: Sequence[Choice], limit: int) -> list[Chosen | None]:
    """One `Chosen` per row, or None where a row's logits are not finite numbers.

    logits [rows, vocabulary] float32, changed in place · ids at or above `limit` are never chosen.
    """
    if not choices:
        return []
    logits = logits[:, :limit]
    adjust(logits, choices)
    logprobs = torch.log_softmax(logits, dim=-1)
    # From the logits: two different logits may round to one log-probability.
    ids = logits.argmax(dim=-1)
    drawn = [row for row, choice in enumerate(choices) if not choice.sampling.greedy]
    if drawn:
        ids[drawn] = draw(logits[drawn], [choices[row] for row in drawn])
    picked = logprobs.gather(1, ids[:, None])[:, 0]
    # A NaN or +inf anywhere in a row makes its normaliser, and so every log-probability of it, a NaN.
    sound = torch.isfinite(picked).tolist()
    tops = alternatives(logprobs, [c.sampling.top_logprobs if ok else 0 for c, ok in zip(choices, sound, strict=True)])
    rows = zip(sound, ids.tolist(), picked.tolist(), tops, strict=True)
    return [Chosen(token, logprob, top) if ok else None for ok, token, logprob, top in rows]


def adjust(logits: Tensor, choices: Sequence[Choice]) -> None:
    """Apply, in this order and in place, repetition, frequency and presence penalties, bias and suppression."""
    rows = [(row, choice) for row, choice in enumerate(choices) if choice.sampling.adjusts]
    if not rows:
        return
    limit = logits.shape[1]
    repeated, counted, biased, suppressed = [], [], [], []
    for row, choice in rows:
        s = choice.sampling
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
    if repeated:
        at, penalty = _scattered(repeated, limit)
        found = logits[at]
        logits[at] = torch.where(found < 0, found * penalty, found / penalty)
    for entries in (counted, biased, suppressed):
        if entries:
            at, delta = _scattered(entries, limit)
            logits[at] = logits[at] + delta


def _scattered(entries: list[tuple[int, np.ndarray, np.ndarray | np.float32]], limit: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Lay (row, ids, values) entries end to end as an index into the logits and the values there, without ids past the limit."""
    rows = np.concatenate([np.full(len(ids), row) for row, ids, _ in entries])
    ids = np.concatenate([ids for _, ids, _ in entries])
    values = np.concatenate([np.broadcast_to(values, len(ids)) for _, ids, values in entries])
    inside = ids < limit
    return (torch.from_numpy(rows[inside]), torch.from_numpy(ids[inside])), torch.from_numpy(values[inside])


def draw(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Draw one id per row from its tempered and truncated distribution. logits [rows, vocabulary] -> [rows] int64"""
    temperatures = torch.tensor([max(c.sampling.temperature, COLDEST) for c in choices], dtype=torch.float32)
    probabilities = torch.softmax(logits / temperatures[:, None], dim=-1)
    seeds = np.array([c.sampling.seed for c in choices], dtype=np.uint64)
    positions = np.array([len(c.ids) for c in choices], dtype=np.uint64)
    where = torch.from_numpy(uniforms(seeds, positions))
    ids = torch.empty(len(choices), dtype=torch.int64)

    whole = [row for row, c in enumerate(choices) if not c.sampling.truncates]
    cut = [row for row, c in enumerate(choices) if c.sampling.truncates]
    if cut:
        settings = [choices[row].sampling for row in cut]
        width = min(probabilities.shape[1], max(CANDIDATES, 2 * max(s.top_k for s in settings)))
        likeliest, tokens = torch.topk(probabilities[cut], width)
        low, high = bounds(likeliest, settings, probabilities.shape[1])
        held = torch.isfinite(low)
        inside = held.nonzero()[:, 0]
        if len(inside):
            rows = torch.tensor(cut)[inside]
            # In order of id, as over the whole vocabulary: zeros between them would not change the sums.
            tokens, order = tokens[inside].sort(dim=-1)
            kept = _within(likeliest[inside].gather(1, order), low[inside], high[inside])
            ids[rows] = tokens.gather(1, invert(kept, where[rows])[:, None])[:, 0]
        wide = (~held).nonzero()[:, 0].tolist()
        if wide:
            rows = torch.tensor([cut[i] for i in wide])
            spread = probabilities[rows]
            low, high = bounds(spread.sort(dim=-1, descending=True).values, [settings[i] for i in wide], spread.shape[1])
            ids[rows] = invert(_within(spread, low, high), where[rows])
    if whole:
        ids[whole] = invert(probabilities[whole] if cut else probabilities, where[whole] if cut else where)
    return ids


def bounds(likeliest: Tensor, settings: Sequence[Sampling], vocabulary: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest probability that survive top-k, top-p, min-p and typical-p, applied in that order.

    likeliest [rows, n]: the n greatest probabilities of each row, descending -> two [rows]. The least is infinite where n
    is too few to tell. Each truncation works on what the one before it left, scaled to sum to 1.
    """
    rows, n = likeliest.shape
    top_k = torch.tensor([min(s.top_k or n, n) for s in settings])
    low = torch.where(
        torch.tensor([s.top_k > 0 for s in settings]),
        likeliest.gather(1, (top_k - 1)[:, None])[:, 0],
        torch.zeros(rows, dtype=likeliest.dtype),
    )
    top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float64)
    if any(s.top_p < 1.0 for s in settings):
        kept = torch.where(likeliest >= low[:, None], likeliest, 0).to(torch.float64)
        mass = kept.cumsum(dim=-1)
        total = torch.where(low > 0, mass[:, -1], 1.0)
        # A token stays while those likelier than it hold less than top-p of the mass; so the first always does.
        last = ((mass - kept < (top_p * total)[:, None]) & (kept > 0)).sum(dim=-1) - 1
        least = likeliest.gather(1, last.clamp(min=0)[:, None])[:, 0]
        low = torch.where(top_p < 1.0, torch.maximum(low, least), low)
    min_p = torch.tensor([s.min_p for s in settings], dtype=likeliest.dtype)
    low = torch.maximum(low, min_p * likeliest[:, 0])
    high = likeliest[:, 0].clone()
    if n < vocabulary:
        low[likeliest[:, -1] >= low] = torch.inf
    for row, s in enumerate(settings):
        if s.typical_p < 1.0 and torch.isfinite(low[row]):
            low[row], high[row] = _typical(likeliest[row], low[row], s.typical_p)
    return low, high


def _typical(likeliest: Tensor, low: Tensor, typical_p: float) -> tuple[float, float]:
    """The bounds of the tokens whose surprise is nearest the expected one, taken until they hold `typical_p` of the mass."""
    kept = likeliest[(likeliest >= low) & (likeliest > 0)].numpy().astype(np.float64)
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


def alternatives(logprobs: Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The `counts[row]` most likely ids of each row with their log-probabilities; the lower id first where two are equal."""
    tops: list[list[tuple[int, float]]] = [[] for _ in counts]
    for count in {c for c in counts if c}:
        rows = [row for row, c in enumerate(counts) if c == count]
        values, ids = torch.topk(logprobs[rows], min(count, logprobs.shape[1]))
        for row, top in zip(rows, zip(ids.tolist(), values.tolist(), strict=True), strict=True):
            tops[row] = sorted(zip(*top, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return tops
