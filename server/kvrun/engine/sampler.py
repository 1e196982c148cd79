"""Chooses the next token of many rows with different settings in one pass.

What a row gets depends on its own logits, ids, settings and position, bit for bit, never on the rows beside it: every
reduction runs along one row in one order, and elementwise arithmetic uses only operations that IEEE 754 rounds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvrun.engine.sampling import Sampling, TokenLogprob, uniforms

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


def sample(logits: Tensor, choices: Sequence[Choice], limit: int) -> list[TokenLogprob | None]:
    """The token chosen for each row, or None where a row's logits are not finite numbers.

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
    # A NaN or +inf anywhere in a row makes its normaliser, and so every log-probability of it, a NaN.
    sound = (~logprobs[:, 0].isnan()).tolist() if drawn else []
    drawn = [row for row in drawn if sound[row]]
    if drawn:
        mixed = len(drawn) < len(choices)
        ids[drawn] = draw(logits[drawn] if mixed else logits, [choices[row] for row in drawn])
    picked = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    tops = alternatives(
        logprobs, [0 if math.isnan(logprob) else c.sampling.top_logprobs for c, logprob in zip(choices, picked, strict=True)]
    )
    rows = zip(ids.tolist(), picked, tops, strict=True)
    return [None if math.isnan(logprob) else TokenLogprob(token, logprob, top) for token, logprob, top in rows]


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
        at, penalty = _scattered(repeated, limit, logits.device)
        found = logits[at]
        logits[at] = torch.where(found < 0, found * penalty, found / penalty)
    for entries in (counted, biased, suppressed):
        if entries:
            at, delta = _scattered(entries, limit, logits.device)
            logits[at] = logits[at] + delta


def _scattered(
    entries: list[tuple[int, np.ndarray, np.ndarray | np.float32]], limit: int, place: torch.device
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Lay (row, ids, values) entries end to end as an index into the logits and the values there, without ids past the limit."""
    rows = np.concatenate([np.full(len(ids), row) for row, ids, _ in entries])
    ids = np.concatenate([ids for _, ids, _ in entries])
    values = np.concatenate([np.broadcast_to(values, len(ids)) for _, ids, values in entries])
    inside = ids < limit
    return (_on(rows[inside], place), _on(ids[inside], place)), _on(values[inside], place)


def _on(numbers: np.ndarray, place: torch.device) -> Tensor:
    return torch.from_numpy(numbers).to(place)


def draw(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Draw one id per row from its tempered and truncated distribution. logits [rows, vocabulary] -> [rows] int64"""
    settings = [choice.sampling for choice in choices]
    temperatures = torch.tensor([max(s.temperature, COLDEST) for s in settings], dtype=torch.float32, device=logits.device)
    probabilities = torch.softmax(logits / temperatures[:, None], dim=-1)
    seeds = np.array([s.seed for s in settings], dtype=np.uint64)
    positions = np.array([len(choice.ids) for choice in choices], dtype=np.uint64)
    where = _on(uniforms(seeds, positions), logits.device)
    ids = torch.full((len(choices),), -1, dtype=torch.int64, device=logits.device)
    cut = [row for row, s in enumerate(settings) if s.truncates]
    if cut:
        ids[cut] = _draw_near(probabilities[cut], [settings[row] for row in cut], where[cut])
    for row in (ids < 0).nonzero()[:, 0].tolist():
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
    return _on(np.sort(kept[kept >= floor])[::-1].copy(), probabilities.device)


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
        if s.typical_p < 1.0 and torch.isfinite(low[row]):
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


def alternatives(logprobs: Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The `counts[row]` most likely ids of each row with their log-probabilities; the lower id first where two are equal."""
    tops: list[list[tuple[int, float]]] = [[] for _ in counts]
    for count in {c for c in counts if c}:
        rows = [row for row, c in enumerate(counts) if c == count]
        values, ids = torch.topk(logprobs[rows], min(count, logprobs.shape[1]))
        for row, top in zip(rows, zip(ids.tolist(), values.tolist(), strict=True), strict=True):
            tops[row] = sorted(zip(*top, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return tops
