"""How a sequence wants its next token chosen, and the random numbers of that choice. No tensor, no state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvrun.errors import ProtocolError

MOST_ALTERNATIVES = 20


@dataclass(frozen=True)
class Sampling:
    """The settings of one sequence; the defaults are greedy choice with everything else off. Raises ProtocolError."""

    temperature: float = 0.0  # 0 = greedy: the truncations and the seed have no effect
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer
    frequency_penalty: float = 0.0  # over the answer
    presence_penalty: float = 0.0  # over the answer
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    suppressed: Sequence[int] = ()
    suppressed_until: int = 0  # answer tokens that must exist before a suppressed id may be sampled
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        rules = {
            "temperature": 0.0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0.0 < self.top_p <= 1.0,
            "typical_p": 0.0 < self.typical_p <= 1.0,
            "min_p": 0.0 <= self.min_p <= 1.0,
            "repetition_penalty": 0.0 < self.repetition_penalty < math.inf,
            "frequency_penalty": math.isfinite(self.frequency_penalty),
            "presence_penalty": math.isfinite(self.presence_penalty),
            "logit_bias": all(not math.isnan(bias) and bias < math.inf for bias in self.logit_bias.values()),
            "top_logprobs": 0 <= self.top_logprobs <= MOST_ALTERNATIVES,
        }
        for name, holds in rules.items():
            if not holds:
                raise ProtocolError(f"sampling.{name} is {getattr(self, name)}, which is outside its range; the router must refuse it")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken as it is."""
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether some tokens are cut off before the draw."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.typical_p < 1.0

    @property
    def adjusts(self) -> bool:
        """Whether the logits change before anything else."""
        return bool(
            self.repetition_penalty != 1.0
            or self.frequency_penalty
            or self.presence_penalty
            or self.logit_bias
            or (self.suppressed and self.suppressed_until)
        )

    def largest_id(self) -> int:
        """The largest token id these settings name, or -1."""
        return max((*self.logit_bias, *self.suppressed), default=-1)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its log-probability before temperature and truncation but after penalties and bias, and what was likelier or next."""

    id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()  # most likely first


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, position), the same wherever and whenever it is asked for.

    seeds, positions [N] uint64 -> [N] float64. Two rounds of the SplitMix64 finaliser: seeds are mixed before positions
    are added, so that neighbouring seeds at neighbouring positions do not meet.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        mixed = _finalise(_finalise(seeds + golden) + golden * (positions + np.uint64(1)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalise(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
