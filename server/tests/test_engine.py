"""A step does what it says, whatever is beside it; a step that breaks a rule is refused before anything is computed."""

import math

import pytest
import torch
from adapters import likeliest
from driver import PAGE_TOKENS, PAGES, SEQUENCES, STEP_TOKENS, Driver
from kvrun.device import available_bytes
from kvrun.engine import batch as batches
from kvrun.engine.memory import MemoryBudget
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Row, Step
from kvrun.errors import OutOfMemory, ProtocolError

PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 9, 30, 33, 61)]
WARM = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2, seed=11, top_logprobs=3)


def warm(seed: int) -> Sampling:
    return Sampling(temperature=0.9, seed=seed, top_k=50, presence_penalty=0.3)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, STEP_TOKENS])
def test_chunks_change_nothing(world, chunk, engines, checkpoint):
    ranks = engines("llama", world)
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 10)
    answers = driver.run(chunk=chunk)
    assert list(answers.values()) == likeliest(checkpoint("llama"), None, list(zip(PROMPTS, answers.values(), strict=True)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_sequence_answers_to_the_bit_alone_and_among_others(world, engines):
    ranks = engines("llama", world)

    def run(mixture) -> dict:
        ranks.reserve()
        driver = Driver(ranks.step)
        for index in mixture:
            driver.add(index, PROMPTS[index], 12, WARM if index % 2 else Sampling(top_logprobs=2))
        driver.run(chunk=16)
        return driver.details

    everyone = range(len(PROMPTS))
    together = run(everyone)
    assert {index: run([index])[index] for index in everyone} == together


def test_the_pages_of_a_released_sequence_serve_in_the_same_step(engines):
    ranks = engines()
    driver = Driver(ranks.step)
    driver.add(1, PROMPTS[3], 6)
    first = driver.run()[1]
    driver.add(2, PROMPTS[4], 30)
    for _ in range(5):
        driver.turn()
    held = set(driver._pages[2])
    driver.release(2)
    driver.add(3, PROMPTS[3], 6)
    driver.turn()
    assert set(driver._pages[3]) & held
    assert driver.run()[3] == first


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("after", [1, 5, 11])
def test_a_sequence_admitted_again_with_its_answer_so_far_goes_on_the_same(after, world, engines):
    ranks = engines("llama", world)
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 16, warm(index))
    whole = {index: list(answer) for index, answer in driver.run().items()}
    ranks.reserve()
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 16, warm(index), committed=whole[index][:after])
    assert driver.run(chunk=20) == whole


@pytest.mark.parametrize("world", [1, 2])
def test_drafts_change_how_fast_an_answer_comes_and_never_which(world, engines):
    ranks = engines("llama", world)
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[2], 20, WARM)
    driver.add(1, PROMPTS[3], 20)
    plain = {index: list(answer) for index, answer in driver.run().items()}
    ranks.reserve()
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[2], 20, WARM)
    driver.add(1, PROMPTS[3], 20)
    turns = 0
    while driver.running:
        rows = []
        for sequence in driver.running:
            said = len(driver.answers[sequence])
            guess = plain[sequence][said : said + 3]
            rows.append(driver.row(sequence, drafts=[*guess[:-1], 3] if turns % 2 else guess))
        driver.turn(rows)
        turns += 1
    assert {index: answer[:20] for index, answer in driver.answers.items()} == plain
    assert turns < 10


@pytest.mark.parametrize("chunk", [5, STEP_TOKENS])
def test_prompt_log_probabilities_are_those_of_the_model(chunk, engines, checkpoint):
    from tiny import oracle

    ranks = engines()
    driver = Driver(ranks.step)
    settings = Sampling(prompt_logprobs=True, top_logprobs=2)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 3, settings if index % 2 == 0 else Sampling())
    driver.run(chunk=chunk)
    for index, logits in enumerate(oracle(checkpoint("llama"), PROMPTS)):
        if index % 2:
            assert not driver.prompts[index]
            continue
        reference = torch.log_softmax(logits, dim=-1)[:-1]
        said, prompt = driver.prompts[index], PROMPTS[index]
        assert [token.id for token in said] == prompt[1:]
        wanted = reference.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert [token.logprob for token in said] == pytest.approx(wanted.tolist(), abs=2e-3)
        assert [[i for i, _ in token.top] for token in said] == reference.topk(2).indices.tolist()


def test_a_row_whose_scores_are_not_numbers_fails_alone_and_until_released(engines, monkeypatch):
    ranks = engines()
    healthy = Driver(ranks.step)
    for index in range(3):
        healthy.add(index, PROMPTS[index], 8)
    wanted = dict(healthy.run())
    ranks.reserve()
    model, driver = ranks.engines[0].model, Driver(ranks.step)
    forward, poisoned = type(model).forward, []

    def sick(self, batch, kv, recorded):
        logits = forward(self, batch, kv, recorded)
        if len(poisoned) == 0 and len(logits) == 3:
            logits[1, 5] = math.nan
            poisoned.append(True)
        return logits

    monkeypatch.setattr(type(model), "forward", sick)
    for index in range(3):
        driver.add(index, PROMPTS[index], 8)
    rows = [driver.row(sequence) for sequence in driver.running]
    # As a router that sends a step before it has the last one's outcome: the sick row has a next one already.
    said = ranks.step(Step(1, [], driver._admit, rows)).rows
    assert said[1].error.startswith("nan_logits") and not said[1].tokens
    again = ranks.step(Step(2, [], [], [Row(1, rows[1].tokens, 1, [], True, [])])).rows
    assert again[0].error == said[1].error
    ranks.reserve()
    poisoned.clear()
    driver = Driver(ranks.step)
    for index in range(3):
        driver.add(index, PROMPTS[index], 8)
    driver.run()
    assert driver.errors.keys() == {1} and driver.answers[0] == wanted[0] and driver.answers[2] == wanted[2]


def test_rows_of_one_adapter_lie_beside_each_other_and_outcomes_in_the_order_asked(engines, adapter, monkeypatch):
    ranks = engines()
    ranks.load(1, adapter("rank1"))
    ranks.load(2, adapter("rank8"))
    seen, build = [], batches.build
    monkeypatch.setattr(batches, "build", lambda work, *rest: seen.append([s.handle for _, s in work]) or build(work, *rest))
    driver = Driver(ranks.step)
    for index in range(6):
        driver.add(index, PROMPTS[1], 2, adapter=index % 3)
    driver.turn()
    assert seen == [[0, 0, 1, 1, 2, 2]]


def test_an_adapter_unloaded_in_flight_still_serves_those_that_began_with_it(engines, adapter):
    ranks = engines()
    ranks.load(1, adapter("rank8"))
    driver = Driver(ranks.step)
    driver.add(0, PROMPTS[2], 10, adapter=1)
    wanted = list(driver.run()[0])
    driver.add(1, PROMPTS[2], 10, adapter=1)
    driver.turn()
    ranks.each(lambda engine: engine.adapters.unload(1))
    assert driver.run()[1] == wanted
    driver.add(2, PROMPTS[2], 10, adapter=1)
    with pytest.raises(ProtocolError, match="handle 1"):
        driver.turn()


GREEDY = Sampling()
ADMIT = Admit(1, [5, 6, 7, 8, 9, 10], 6, GREEDY, 0)
BROKEN = {
    "step 3 came after": Step(3, [], [], []),
    "never admitted": Step(1, [], [], [Row(9, 0, 1, [0], True, [])]),
    "up to token 7, but 6 are known": Step(1, [], [ADMIT], [Row(1, 0, 7, [0, 1], True, [])]),
    "samples after token 3, but 6": Step(1, [], [ADMIT], [Row(1, 0, 3, [0, 1], True, [])]),
    "a row has at least one": Step(1, [], [ADMIT], [Row(1, 0, 0, [0, 1], False, [])]),
    "page 600": Step(1, [], [ADMIT], [Row(1, 0, 6, [0, 600], True, [])]),
    "its 1 pages": Step(1, [], [ADMIT], [Row(1, 0, 6, [0], True, [])]),
    "two rows of one": Step(1, [], [ADMIT], [Row(1, 0, 3, [0, 1], False, []), Row(1, 3, 3, [], True, [])]),
    "token id 259": Step(1, [], [Admit(1, [5, 259], 2, GREEDY, 0)], []),
    "token id 300": Step(1, [], [Admit(1, [5], 1, Sampling(logit_bias={300: 1.0}), 0)], []),
    "admitted already": Step(1, [], [ADMIT, ADMIT], []),
    "are prompt": Step(1, [], [Admit(1, [5], 2, GREEDY, 0)], []),
    "handle 4": Step(1, [], [Admit(1, [5], 1, GREEDY, 4)], []),
    "513 tokens": Step(1, [], [Admit(1, [5] * 513, 513, GREEDY, 0)], [Row(1, 0, 513, range(129), True, [])]),
    "drafts need": Step(1, [], [ADMIT], [Row(1, 0, 7, [0, 1], False, [5])]),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_step_that_breaks_a_rule_is_refused(rule, engines):
    with pytest.raises(ProtocolError, match=rule):
        engines().step(BROKEN[rule])


def test_a_row_that_does_not_start_where_its_sequence_stands_is_refused(engines):
    ranks = engines()
    ranks.step(Step(1, [], [ADMIT], [Row(1, 0, 3, [0, 1], False, [])]))
    with pytest.raises(ProtocolError, match="starts at 2, but 3 tokens are computed"):
        ranks.step(Step(2, [], [], [Row(1, 2, 4, [], True, [])]))


def test_a_sequence_may_begin_behind_pages_that_another_filled(engines):
    ranks = engines()
    prompt = PROMPTS[2]
    driver = Driver(ranks.step)
    driver.add(1, prompt, 8)
    driver.turn()
    shared = driver._pages[1][: len(prompt) // PAGE_TOKENS]
    begin = len(shared) * PAGE_TOKENS
    own = [driver.free.pop() for _ in range(3)]
    step = Step(
        driver.number + 1, [], [Admit(2, prompt, len(prompt), GREEDY, 0)], [Row(2, begin, len(prompt) - begin, shared + own, True, [])]
    )
    assert [token.id for token in ranks.step(step).rows[0].tokens] == driver.answers[1][:1]


def test_no_rows_is_a_step_too(engines):
    assert engines("llama", 2).step(Step(1, [7], [], [])).rows == []


def test_the_largest_step_runs(engines):
    driver = Driver(engines().step)
    for index in range(SEQUENCES):
        driver.add(index, PROMPTS[index % 5][:7], 3, warm(index) if index % 2 else None)
    assert all(len(answer) == 3 for answer in driver.run(chunk=STEP_TOKENS // SEQUENCES).values())
    assert sorted(driver.free) == list(range(PAGES))


def test_pages_come_from_the_budget():
    budget = MemoryBudget(kv_cache_bytes=1000)
    assert budget.pages(0, 100, 0) == 10 and budget.pages(0, 100, 4) == 4 and budget.pages(7, 100, 4) == 7
    for asked, size in ((11, 100), (0, 1001)):
        with pytest.raises(OutOfMemory, match="--kv-cache-bytes"):
            budget.pages(asked, size, 0)


def test_what_is_free_respects_the_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:  50 kB\n")
    assert available_bytes(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("20480\n")
    (tmp_path / "memory.current").write_text("480\n")
    assert available_bytes(meminfo, tmp_path) == 20000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 50 * 1024
