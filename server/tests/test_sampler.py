"""Every setting draws from transformers' distribution for it; a row's token depends on nothing but the row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvrun.device import Cpu
from kvrun.engine import sampler
from kvrun.engine.sampler import Adjustments, Choice
from kvrun.engine.sampling import Sampling, TokenLogprob, uniforms
from kvrun.errors import ProtocolError
from transformers.generation import logits_process as hf

VOCABULARY = 300
GRID = 4_000


def logits(rows: int = 1, vocabulary: int = VOCABULARY, seed: int = 0, spread: float = 2.5) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def choice(prompt=(1, 2, 3), answer=(), **settings) -> Choice:
    return Choice(Sampling(**settings), np.array([*prompt, *answer], np.int64), len(prompt))


def sample(scores: torch.Tensor, choices: list[Choice], limit: int) -> list[TokenLogprob | None]:
    """What is chosen for each row, as the host reads it."""
    return sampler.sample(scores, choices, limit, Cpu()).tokens([choice.sampling.top_logprobs for choice in choices])


def drawn(scores: torch.Tensor, settings: dict, monkeypatch, **ids) -> torch.Tensor:
    """The distribution that the settings give, read off an even grid of random numbers instead of by chance."""
    grid = (np.arange(GRID) + 0.5) / GRID
    monkeypatch.setattr(sampler, "uniforms", lambda seeds, positions: grid)
    rows = sample(scores.expand(GRID, -1).clone(), [choice(**ids, **settings)] * GRID, scores.shape[-1])
    return torch.bincount(torch.tensor([row.id for row in rows]), minlength=scores.shape[-1]) / GRID


def expected(scores: torch.Tensor, *processors, ids=(1, 2, 3)) -> torch.Tensor:
    """The distribution that transformers gives."""
    out = scores.clone()
    for processor in processors:
        out = processor(torch.tensor([ids]), out)
    return torch.softmax(out, dim=-1)[0]


TRUNCATIONS = [
    ({}, []),
    ({"temperature": 0.3}, [hf.TemperatureLogitsWarper(0.3)]),
    ({"temperature": 1.9}, [hf.TemperatureLogitsWarper(1.9)]),
    ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
    ({"top_k": 7}, [hf.TopKLogitsWarper(7)]),
    ({"top_k": 10_000}, []),
    ({"top_p": 0.01}, [hf.TopPLogitsWarper(0.01)]),
    ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
    ({"top_p": 0.9999}, [hf.TopPLogitsWarper(0.9999)]),
    ({"min_p": 0.05}, [hf.MinPLogitsWarper(0.05)]),
    ({"typical_p": 0.2}, [hf.TypicalLogitsWarper(0.2)]),
    ({"typical_p": 0.95}, [hf.TypicalLogitsWarper(0.95)]),
    (
        {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.7},
        [
            hf.TemperatureLogitsWarper(1.4),
            hf.TopKLogitsWarper(40),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.02),
            hf.TypicalLogitsWarper(0.7),
        ],
    ),
]


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5_000])
@pytest.mark.parametrize(("settings", "processors"), TRUNCATIONS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_truncations_draw_from_the_distribution_of_transformers(settings, processors, vocabulary, monkeypatch):
    monkeypatch.setattr(sampler, "CANDIDATES", 64)  # so that both the short way and the long one are taken
    monkeypatch.setitem(globals(), "GRID", 1_000 if vocabulary > VOCABULARY else GRID)
    scores = logits(vocabulary=vocabulary)
    found = drawn(scores, {"temperature": 1.0, **settings}, monkeypatch)
    wanted = expected(scores, *processors)
    assert (found - wanted).abs().max() < 2.0 / GRID
    assert found[wanted == 0].sum() == 0


PENALTIES = [
    ({"repetition_penalty": 1.3}, [hf.RepetitionPenaltyLogitsProcessor(1.3)]),
    ({"repetition_penalty": 0.7}, [hf.RepetitionPenaltyLogitsProcessor(0.7)]),
    ({"logit_bias": {5: 3.0, 9: -math.inf}}, [hf.SequenceBiasLogitsProcessor([[[5], 3.0], [[9], -math.inf]])]),
    ({"suppressed": (2, 8), "suppressed_until": 5}, [hf.MinNewTokensLengthLogitsProcessor(3, 5, [2, 8], device="cpu")]),
    ({"suppressed": (2, 8), "suppressed_until": 4}, [hf.MinNewTokensLengthLogitsProcessor(3, 4, [2, 8], device="cpu")]),
]


@pytest.mark.parametrize(("settings", "processors"), PENALTIES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_penalties_bias_and_suppression_equal_those_of_transformers(settings, processors, monkeypatch):
    prompt, answer = [4, 5, 6], [7, 7, 8, 5]
    found = drawn(logits(), {"temperature": 1.0, **settings}, monkeypatch, prompt=prompt, answer=answer)
    wanted = expected(logits(), *processors, ids=[*prompt, *answer])
    assert (found - wanted).abs().max() < 2.0 / GRID


def test_frequency_and_presence_count_the_answer_and_not_the_prompt():
    scores = logits()
    adjusted = scores.clone()
    counted = choice([4, 5, 5], [7, 7, 8], frequency_penalty=0.5, presence_penalty=0.25)
    sampler.adjust(adjusted, Adjustments.of([counted], VOCABULARY))
    change = torch.zeros(VOCABULARY)
    change[7], change[8] = -1.25, -0.75
    assert torch.equal(adjusted[0], scores[0] + change)


def test_log_probabilities_are_of_the_adjusted_logits_before_temperature_and_truncation():
    scores = logits()
    settings = {"temperature": 0.2, "top_k": 2, "logit_bias": {3: 1.5}, "top_logprobs": 20}
    reference = scores[0].clone()
    reference[3] += 1.5
    reference = torch.log_softmax(reference, dim=-1)
    row = sample(scores.clone(), [choice(**settings)], VOCABULARY)[0]
    assert row.logprob == pytest.approx(reference[row.id].item(), abs=1e-6)
    values, ids = reference.topk(20)
    assert [token for token, _ in row.top] == ids.tolist()
    assert [value for _, value in row.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_ids_that_pad_the_vocabulary_are_never_chosen_and_hold_no_probability():
    scores = logits()
    scores[0, 290:] = 50.0
    greedy, random = sample(scores.expand(2, -1).clone(), [choice(), choice(temperature=5.0, seed=3)], 290)
    assert greedy.id == scores[0, :290].argmax() and random.id < 290
    assert greedy.logprob == pytest.approx(torch.log_softmax(scores[0, :290], dim=-1).max().item(), abs=1e-6)


SETTINGS = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 400]),
    top_p=st.sampled_from([1.0, 0.99, 0.6]),
    typical_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {4: 2.0}]),
    top_logprobs=st.sampled_from([0, 3]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(SETTINGS, min_size=2, max_size=9), st.integers(0, 99), st.sampled_from([259, 1003, 8191]))
def test_a_row_gets_the_same_token_to_the_bit_alone_and_in_any_batch(rows, seed, vocabulary):
    scores = logits(len(rows), vocabulary, seed)
    choices = [choice(range(3, 4 + i), range(20, 25 + i), **row) for i, row in enumerate(rows)]
    together = sample(scores.clone(), choices, vocabulary)
    backwards = sample(scores.flip(0), choices[::-1], vocabulary)[::-1]
    alone = [sample(scores[i : i + 1].clone(), [choices[i]], vocabulary)[0] for i in range(len(rows))]
    assert together == backwards == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sick_row_fails_alone(bad):
    settings = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "typical_p": 0.5}, {"repetition_penalty": 1.2}]
    choices = [choice(**s) for s in settings for _ in range(2)]
    scores = logits(len(choices))
    healthy = sample(scores.clone(), choices, VOCABULARY)
    scores[::2, 17] = bad
    found = sample(scores, choices, VOCABULARY)
    assert found[::2] == [None] * len(settings)
    assert found[1::2] == healthy[1::2]


def test_random_numbers_are_even_and_unrelated_across_seeds_and_positions():
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64), indexing="ij")
    numbers = uniforms(seeds.ravel(), positions.ravel()).reshape(300, 300)
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    chi_square = ((counts - 900.0) ** 2 / 900.0).sum()
    assert chi_square < 149  # 99 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(numbers[1:, :-1].ravel(), numbers[:-1, 1:].ravel())[0, 1]) < 0.01


def test_seeds_in_a_row_draw_from_the_exact_distribution():
    scores, rows = logits(vocabulary=40, spread=1.5), 20_000
    found = sample(scores.expand(rows, -1).clone(), [choice(temperature=1.0, seed=seed) for seed in range(rows)], 40)
    counts = np.bincount([row.id for row in found], minlength=40)
    wanted = torch.softmax(scores[0], dim=-1).numpy() * rows
    assert ((counts - wanted) ** 2 / wanted).sum() < 72  # 39 degrees of freedom, 0.1 %


@pytest.mark.parametrize("position", [0, 7, 100_000])
def test_the_same_seed_and_position_give_the_same_number(position):
    one = uniforms(np.array([2**64 - 1], np.uint64), np.array([position], np.uint64))
    many = uniforms(np.array([5, 2**64 - 1, 6], np.uint64), np.array([1, position, position], np.uint64))
    assert one[0] == many[1] and 0.0 <= one[0] < 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan}, {"temperature": -0.1}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": math.nan},
        {"typical_p": 0.0}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"frequency_penalty": math.inf}, {"presence_penalty": math.nan},
        {"logit_bias": {1: math.nan}}, {"top_logprobs": 21},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_outside_its_range_is_refused_by_name(wrong):
    with pytest.raises(ProtocolError, match=next(iter(wrong))):
        Sampling(**wrong)
