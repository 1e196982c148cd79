"""Models that turn long sequences otherwise than short ones: which of the two a sequence is holds from its first token to its last."""

import pytest
import torch
from driver import Driver
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Row, Step
from kvrun.errors import ProtocolError
from kvrun.rpc.convert import to_step
from test_parity import prompts
from tiny import TIE, behind, oracle
from wire import to_pb

ROW, AFTER, COUNT = "phi3_longrope", 32, 16
ASKED = prompts(seed=3, lengths=(3, 15, 16, 17, 30, 40, 70))  # with their answers: two short ones, and five long ones


def first_logits(ranks, prompt: list[int], long: bool) -> torch.Tensor:
    """Log-probabilities of every prompt token after the first."""
    ranks.reserve()
    driver = Driver(ranks.step)
    driver.add(1, prompt, 1, Sampling(prompt_logprobs=True), long=long)
    driver.run()
    return torch.tensor([token.logprob for token in driver.prompts[1]])


@pytest.mark.parametrize(("world", "chunk"), [(1, 512), (1, 7), (2, 7)])
def test_short_and_long_sequences_in_one_batch_answer_as_transformers_would(world, chunk, engines, checkpoint):
    driver = Driver(engines(ROW, world).step)
    for sequence, prompt in enumerate(ASKED):
        driver.add(sequence, prompt, COUNT, long=len(prompt) + COUNT > AFTER)
    answers = driver.run(chunk)
    # transformers takes the table of the length it is given, so it is given each answer in full.
    for sequence, logits in enumerate(oracle(checkpoint(ROW), [prompt + answers[s] for s, prompt in enumerate(ASKED)])):
        assert behind(logits, answers[sequence]) < TIE


def test_a_long_sequence_is_one_from_its_first_tokens(engines):
    ranks, prompt = engines(ROW), ASKED[1]
    assert (first_logits(ranks, prompt, long=True) - first_logits(ranks, prompt, long=False)).abs().max() > 0.1


def test_nothing_is_long_for_other_models(engines):
    ranks, prompt = engines("llama"), ASKED[1]
    assert torch.equal(first_logits(ranks, prompt, long=True), first_logits(ranks, prompt, long=False))


def test_a_sequence_that_outgrows_what_it_was_admitted_as_is_refused(engines):
    ranks = engines(ROW)
    tokens = ASKED[6]
    step = Step(1, [], [Admit(1, tokens, len(tokens), Sampling(), 0)], [Row(1, 0, AFTER + 1, range(9), False, [])])
    with pytest.raises(ProtocolError, match="reaches position 33, past 32, and was not admitted as long"):
        ranks.step(step)


def test_the_wire_says_after_how_many_tokens_and_which_sequences(engines):
    assert engines(ROW).engines[0].describe()["long_after"] == AFTER
    assert engines("llama").engines[0].describe()["long_after"] == 0
    admits = [Admit(1, [5], 1, Sampling(), 0, long=True), Admit(2, [5], 1, Sampling(), 0)]
    assert [admit.long for admit in to_step(to_pb(1, Step(1, [], admits, []))).admit] == [True, False]
