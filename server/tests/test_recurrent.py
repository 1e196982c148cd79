"""Models that carry a state along: requests come and go, prompts come in chunks, ranks share channels, and no state is mixed up."""

import json
import math
from dataclasses import replace

import kvrun_kernels
import pytest
import torch
from driver import SEQUENCES, STEP_TOKENS, Driver
from kvrun import models
from kvrun.engine.memory import MemoryBudget
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Row, Step
from kvrun.errors import OutOfMemory, ProtocolError, Unsupported
from kvrun.inspect import inspect_model
from kvrun.nn.build import load_model
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun.spec import Config, Model, Residual, model_of
from ragged import Runner
from tiny import CLOSE, distance, oracle
from wire import group

# Without it torch's own functions serve, which round otherwise at the end of a tensor than within.
NATIVE = kvrun_kernels.describe().get("ssd_scan", "reference") != "reference"
PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 2, 9, 30, 61)]


def settings(index: int) -> Sampling:
    return Sampling(temperature=0.9, top_k=40, seed=index, top_logprobs=2) if index % 2 else Sampling(top_logprobs=2)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("row", ["mamba", "mamba2"])
def test_requests_join_and_leave_and_each_answers_as_transformers_would(row, world, engines, checkpoint):
    driver = Driver(engines(row, world).step)
    for turn in range(3 * len(PROMPTS)):  # one comes each turn, and a released one's slot is taken at once
        driver.add(turn, PROMPTS[turn % len(PROMPTS)], 3 + turn % 7)
        driver.turn(chunk=7)
    answers = driver.run(chunk=7)
    for sequence, answer in answers.items():
        prompt = PROMPTS[sequence % len(PROMPTS)]
        logits = oracle(checkpoint(row), [prompt + answer[:-1]])[0][len(prompt) - 1 :]
        assert answer == logits.argmax(-1).tolist()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", ["mamba_biased", "falcon_mamba", "mamba2_one_group"])
def test_chunks_and_neighbours_change_no_bit(row, world, engines):
    ranks = engines(row, world)
    exact = NATIVE or row != "mamba2_one_group"

    def run(mixture, chunk: int) -> dict:
        ranks.reserve()
        driver = Driver(ranks.step)
        for index in mixture:
            driver.add(index, PROMPTS[index], 8, settings(index))
        answers = driver.run(chunk=chunk)
        return driver.details if exact else answers

    everyone = range(len(PROMPTS))
    together = run(everyone, STEP_TOKENS)
    assert run(everyone, 5) == run(everyone, 1) == together
    assert {index: run([index], 16)[index] for index in everyone} == together


@pytest.mark.parametrize("row", ["mamba", "mamba2"])
def test_a_sequence_admitted_again_with_its_answer_so_far_goes_on_the_same(row, engines):
    ranks = engines(row, 2)
    driver = Driver(ranks.step)
    for index, prompt in enumerate(PROMPTS):
        driver.add(index, prompt, 12, settings(index))
    whole = {index: list(answer) for index, answer in driver.run().items()}
    for after in (1, 7):
        ranks.reserve()
        driver = Driver(ranks.step)
        for index, prompt in enumerate(PROMPTS):
            driver.add(index, prompt, 12, settings(index), committed=whole[index][:after])
        assert driver.run(chunk=9) == whole


def test_every_slot_may_be_taken_and_not_one_more(engines):
    ranks = engines("mamba")
    driver = Driver(ranks.step)
    for index in range(SEQUENCES):
        driver.add(index, PROMPTS[1], 2)
    driver.turn()
    with pytest.raises(ProtocolError, match="every slot is taken"):
        ranks.step(Step(2, [], [Admit(SEQUENCES, [5], 1, Sampling(), 0)], []))
    ranks.reserve()
    driver = Driver(ranks.step)
    for index in range(3 * SEQUENCES):
        if index >= SEQUENCES:
            driver.release(index - SEQUENCES)
        driver.add(index, PROMPTS[index % 2], 90)
        if index >= SEQUENCES - 1:
            driver.turn()
    assert len({tuple(driver.answers[index][:1]) for index in range(SEQUENCES)}) == 2


@pytest.mark.parametrize(
    ("rule", "row"),
    [("no state is kept", Row(1, 4, 2, [0, 1], True, [])), ("taken back", Row(1, 0, 7, [0, 1], True, [9]))],
)
def test_a_step_that_would_need_another_state_is_refused(rule, row, engines):
    with pytest.raises(ProtocolError, match=rule):
        engines("mamba").step(Step(1, [], [Admit(1, [5, 6, 7, 8, 9, 10], 6, Sampling(), 0)], [row]))


def test_it_says_that_it_keeps_slots_and_what_they_take(engines, checkpoint):
    whole, half = engines("mamba"), engines("mamba", 2)
    said = whole.engines[0].describe()
    assert said["state_kinds"] == ["slots"] and said["page_bytes"] == 0 and said["decoder_start"] is None
    layers, channels, taps, size = 2, 128, 4, 8
    bytes_of_a_slot = layers * channels * (taps - 1 + size) * 4
    assert whole.engines[0].model.slot_bytes == bytes_of_a_slot == 2 * half.engines[0].model.slot_bytes
    assert inspect_model(checkpoint("mamba"), "float32").slot_bytes == bytes_of_a_slot
    facts = inspect_model(checkpoint("mamba"), "bfloat16", world=2)
    assert facts.slot_bytes == layers * channels // 2 * ((taps - 1) * 2 + size * 4) and facts.page_bytes == 0


def test_over_the_wire_it_is_described_and_answers_the_same(checkpoint, tmp_path, engines):
    def run(step) -> dict:
        driver = Driver(step)
        for index, prompt in enumerate(PROMPTS):
            driver.add(index, prompt, 8, settings(index))
        return driver.run(chunk=9)

    with group(checkpoint("mamba"), tmp_path, 1) as (shard,):
        said = shard.calls.Describe(pb.DescribeRequest())
        assert list(said.state_kinds) == ["slots"] and said.page_bytes == 0 and not said.HasField("decoder_start")
        shard.reserve(1)
        assert run(shard.run(1).step) == run(engines("mamba").step)


def test_slots_and_pages_share_a_budget():
    budget = MemoryBudget(kv_cache_bytes=1000)
    assert budget.pages(0, 100, 0, slots=4, slot_bytes=100) == 6
    assert budget.pages(7, 0, 0) == 7 and budget.pages(0, 0, 9) == 9 and budget.pages(0, 0, 0) > 1000
    with pytest.raises(OutOfMemory, match="--max-batch-size to 3 or less"):
        budget.pages(0, 0, 0, slots=4, slot_bytes=300)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("row", ["mamba", "falcon_mamba", "mamba2"])
def test_a_narrow_model_stays_near_its_float32_self(row, dtype, checkpoint):
    runner = Runner()
    runner.load(checkpoint(row))
    exact = runner.step(list(enumerate(PROMPTS)))
    runner.load(checkpoint(row), dtype)
    assert {layer.dtype for layer in runner.kv.slots.layers} == {getattr(torch, dtype), torch.float32}
    rough = runner.step(list(enumerate(PROMPTS)))
    assert 1e-4 < ((rough - exact).abs().mean() / exact.std()).item() < 0.1


def test_the_sum_over_the_layers_is_kept_in_float32(checkpoint, monkeypatch):
    runner = Runner()
    runner.load(checkpoint("mamba"), "bfloat16")
    seen, residual = [], runner.model.decoder.residuals[0]
    call = type(residual).__call__
    monkeypatch.setattr(type(residual), "__call__", lambda self, x, step: seen.append(x.dtype) or call(self, x, step))
    runner.step([(0, PROMPTS[2])])
    assert seen == [torch.float32] * 2


def test_another_activation_than_the_kernel_s_is_refused(checkpoint, tmp_path):
    from tiny import write_checkpoint

    folder = write_checkpoint("mamba", tmp_path, edit=lambda config: {**config, "hidden_act": "gelu"})
    with pytest.raises(Unsupported, match="gelu"):
        load_model(folder)


CODESTRAL = {  # Mamba-Codestral-7B
    "architectures": ["Mamba2ForCausalLM"],
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 8,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "residual_in_fp32": True,
    "state_size": 128,
    "tie_word_embeddings": False,
    "vocab_size": 32768,
}


@pytest.mark.parametrize("limit", ["[0.0, Infinity]", '[0.0, {"__float__": "Infinity"}]'])
def test_time_steps_without_a_limit_are_written_in_two_ways(limit):
    (step,) = model_of(Config({**CODESTRAL, "time_step_limit": json.loads(limit)})).decoder.layers[0].steps
    (mixer,) = step.mixers
    assert (mixer.least, mixer.most, mixer.heads * mixer.head_dim) == (0.0, math.inf, 8192)


def changed(model: Model, **fields: object) -> Model:
    """The model with these fields of its mixers replaced."""

    def residual(step: Residual) -> Residual:
        return Residual(step.norm, *(replace(mixer, **fields) for mixer in step.mixers), after=step.after, scale=step.scale)

    layers = tuple(replace(layer, steps=tuple(map(residual, layer.steps))) for layer in model.decoder.layers)
    return replace(model, decoder=replace(model.decoder, layers=layers))


MUTATIONS = {
    "no norm of what a token chooses": ("falcon_mamba", lambda m: changed(m, select_eps=None)),
    "a norm of what a token chooses": ("mamba", lambda m: changed(m, select_eps=1e-6)),
    "another epsilon of the group norm": ("mamba2", lambda m: changed(m, eps=10.0)),
    "time steps not kept within their limits": ("mamba2_one_group", lambda m: changed(m, least=0.0, most=math.inf)),
    "time steps from another vector": ("mamba2", lambda m: changed(m, step_bias="mixer.D")),
    "inputs passed on by another share": ("mamba2", lambda m: changed(m, skip="mixer.dt_bias")),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees(mutation, checkpoint, monkeypatch):
    row, change = MUTATIONS[mutation]
    honest = models.read
    monkeypatch.setattr(models, "read", lambda folder: (honest(folder)[0], change(honest(folder)[1])))
    monkeypatch.setattr("kvrun.weights.load.Loader.audit", lambda *_: None)  # a tensor may go unread
    runner = Runner()
    runner.load(checkpoint(row))
    logits = runner.step(list(enumerate(PROMPTS)))
    assert distance(logits, torch.cat(oracle(checkpoint(row), PROMPTS))) > CLOSE


SLIPS = {
    "inputs not passed on": lambda mixer: replace(mixer, skip=torch.zeros_like(mixer.skip)),
    "states that do not fade": lambda mixer: replace(mixer, decay=torch.zeros_like(mixer.decay)),
    "a window of the convolution shifted by one": lambda mixer: replace(
        mixer, conv=replace(mixer.conv, weight=mixer.conv.weight.roll(1, dims=1).contiguous())
    ),
    "no bias of the time step": lambda mixer: replace(mixer, step_bias=torch.zeros_like(mixer.step_bias)),
}


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("row", ["mamba", "mamba2"])
def test_the_comparison_sees_a_slip_in_a_module(row, slip, checkpoint):
    runner = Runner()
    runner.load(checkpoint(row))
    for residual in runner.model.decoder.residuals:
        branch = residual.branches[0]
        object.__setattr__(residual, "branches", (replace(branch, mixers=tuple(map(SLIPS[slip], branch.mixers))),))
    logits = runner.step(list(enumerate(PROMPTS)))
    assert distance(logits, torch.cat(oracle(checkpoint(row), PROMPTS))) > CLOSE
