"""Models that read a source once and then write: every answer looks at its own source, however many are read at once."""

from dataclasses import replace

import pytest
import torch
from driver import PAGES, STEP_TOKENS, Driver
from kvrun import models
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Row, Step
from kvrun.errors import ProtocolError, Unsupported
from kvrun.inspect import inspect_model
from kvrun.nn.build import load_model
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun.spec import (
    Attention,
    Config,
    CrossAttention,
    Encoder,
    GatedMlp,
    Mlp,
    Model,
    RelativeBias,
    Residual,
    SourceAttention,
    TwoSidedBias,
    model_of,
)
from ragged import Runner
from tiny import CLOSE, ROWS, distance, oracle_model
from tiny.t5 import T5
from wire import group

COUNT = 24
START = T5["decoder_start_token_id"]
# Lengths within a page, at its end, and past the distance at which biases of positions end.
SOURCES = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 4, 9, 30, 90)]
FAMILY = ("t5", "flan_t5", "flan_t5_untied")


def settings(index: int) -> Sampling:
    return Sampling(temperature=0.9, top_k=40, seed=index, top_logprobs=2) if index % 2 else Sampling(top_logprobs=2)


def transformers_choices(checkpoint, answers: list[list[int]], sources=SOURCES, adapter=None) -> list[list[int]]:
    """What transformers likes best at every place of each answer to its source."""
    model = oracle_model(checkpoint)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        scores = [
            model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[START, *answer[:-1]]])).logits[0]
            for source, answer in zip(sources, answers, strict=True)
        ]
    return [rows.argmax(dim=-1).tolist() for rows in scores]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("row", FAMILY)
def test_greedy_answers_to_sources_of_any_length_in_one_batch_are_transformers_own(row, world, engines, checkpoint):
    driver = Driver(engines(row, world).step)
    for index, source in enumerate(SOURCES):
        driver.add(index, [START], COUNT, source=source)
    answers = list(driver.run().values())
    assert answers == transformers_choices(checkpoint(row), answers)
    assert len({token for answer in answers for token in answer}) > 10 and sorted(driver.free) == list(range(PAGES))


@pytest.mark.parametrize("world", [1, 2])
def test_neighbours_chunks_and_replays_change_no_bit(world, engines):
    ranks = engines("flan_t5", world)

    def run(mixture, chunk: int = STEP_TOKENS, committed=None) -> dict:
        ranks.reserve()
        driver = Driver(ranks.step)
        for index in mixture:
            driver.add(index, [START], 12, settings(index), source=SOURCES[index], committed=(committed or {}).get(index, ()))
        driver.run(chunk=chunk)
        return driver.details if committed is None else driver.answers

    everyone = range(len(SOURCES))
    together = run(everyone)
    assert {index: run([index])[index] for index in everyone} == together
    answers = {index: [token.id for token in said] for index, said in together.items()}
    for after, chunk in ((1, STEP_TOKENS), (9, 4)):
        assert run(everyone, chunk, {index: answer[:after] for index, answer in answers.items()}) == answers


def test_sequences_come_and_go_and_memories_pages_serve_again(engines, checkpoint):
    driver = Driver(engines("t5").step)
    for turn in range(4 * len(SOURCES)):
        driver.add(turn, [START], 2 + turn % 5, source=SOURCES[turn % len(SOURCES)])
        driver.turn()
    answers = driver.run()
    sources = [SOURCES[turn % len(SOURCES)] for turn in answers]
    assert list(answers.values()) == transformers_choices(checkpoint("t5"), list(answers.values()), sources)
    assert sorted(driver.free) == list(range(PAGES))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("row", ["t5", "flan_t5"])
def test_an_adapter_changes_encoder_and_decoder_as_peft_says(row, world, engines, checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    targets = ["q", "k", "v", "o", "wo", *(("wi",) if row == "t5" else ("wi_0", "wi_1"))]
    model = get_peft_model(oracle_model(checkpoint(row)), LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path)
    ranks = engines(row, world)
    loaded = ranks.load(1, tmp_path)
    layers = T5["num_layers"] * (4 + len(targets) - 4) + T5["num_decoder_layers"] * (8 + len(targets) - 4)
    assert loaded.matched == 2 * layers
    driver = Driver(ranks.step)
    for index, source in enumerate(SOURCES):
        driver.add(index, [START], COUNT, source=source, adapter=1)
        driver.add(100 + index, [START], COUNT, source=source)
    answers = driver.run()
    with_adapter, base = ([answers[first + index] for index in range(len(SOURCES))] for first in (0, 100))
    assert with_adapter == transformers_choices(checkpoint(row), with_adapter, adapter=tmp_path)
    assert base == transformers_choices(checkpoint(row), base) != with_adapter


FIRST = {  # t5-small, without the fields that later files state
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
FLAN = {**FIRST, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 8, "tie_word_embeddings": False}


def test_published_files_of_every_generation_are_understood():
    first, flan = model_of(Config(FIRST)), model_of(Config(FLAN))
    again = model_of(Config({**FLAN, "tie_word_embeddings": True, "scale_decoder_outputs": False}))  # as transformers 5 writes it
    heads = [(model.decoder.head.tied, model.decoder.head.scale) for model in (first, flan, again)]
    assert heads == [(True, 512**-0.5), (False, 1.0), (True, 1.0)]
    acts = [model.decoder.layers[0].steps[-1].mixers[0] for model in (first, flan)]
    assert [(type(act), act.act) for act in acts] == [(Mlp, "relu"), (GatedMlp, "gelu_new")]
    assert [len(model.decoder.layers) for model in (first, flan)] == [6, 8] and (first.positions, first.start) == (0, 0)


def admitted(**fields) -> Admit:
    return replace(Admit(1, [START], 1, Sampling(), 0), **fields)


BROKEN = {
    "has no source": admitted(),
    "answers of this model begin with 0": admitted(tokens=[5], memory_tokens=[5], memory_pages=[0]),
    "token id 259 of its source": admitted(memory_tokens=[5, 259], memory_pages=[0]),
    "its 1 memory pages hold 4": admitted(memory_tokens=[5] * 5, memory_pages=[0]),
    "memory page 600": admitted(memory_tokens=[5] * 5, memory_pages=[0, 600]),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_sequence_whose_source_breaks_a_rule_is_refused(rule, engines):
    with pytest.raises(ProtocolError, match=rule):
        engines("t5").step(Step(1, [], [BROKEN[rule]], []))


def test_a_source_for_a_model_without_an_encoder_is_refused(engines):
    with pytest.raises(ProtocolError, match="no encoder"):
        engines("llama").step(Step(1, [], [admitted(memory_tokens=[5], memory_pages=[0])], []))


def test_sources_count_among_a_step_s_tokens(engines):
    source = admitted(memory_tokens=[5] * STEP_TOKENS, memory_pages=range(STEP_TOKENS // 4))
    with pytest.raises(ProtocolError, match=f"{STEP_TOKENS + 1} tokens"):
        engines("t5").step(Step(1, [], [source], [Row(1, 0, 1, [599], True, [])]))


def test_over_the_wire_it_is_described_and_answers_the_same(checkpoint, tmp_path, engines):
    def run(step) -> dict:
        driver = Driver(step)
        for index, source in enumerate(SOURCES):
            driver.add(index, [START], 8, settings(index), source=source)
        return driver.run()

    with group(checkpoint("flan_t5"), tmp_path, 1) as (shard,):
        said = shard.calls.Describe(pb.DescribeRequest())
        assert list(said.state_kinds) == ["pages", "memory"] and said.HasField("decoder_start") and said.decoder_start == START
        shard.reserve(1)
        assert run(shard.run(1).step) == run(engines("flan_t5").step)


def test_a_memory_lies_in_the_layers_of_the_decoder_s_own_attention(engines, checkpoint):
    said = engines("t5").engines[0].describe()
    assert said["state_kinds"] == ["pages", "memory"] and said["decoder_start"] == START
    per_token = T5["num_decoder_layers"] * 2 * T5["num_heads"] * T5["d_kv"]
    assert said["page_bytes"] == per_token * 4 * 4
    assert inspect_model(checkpoint("t5"), "float32").page_bytes == per_token * 16 * 4


def test_bfloat16_stays_near_float32_and_float16_is_refused_with_the_reason(checkpoint):
    runner, asked = Runner(), list(enumerate(SOURCES))
    runner.load(checkpoint("flan_t5"))
    exact = runner.step(asked)
    runner.load(checkpoint("flan_t5"), "bfloat16")
    rough = runner.step(asked)
    assert 1e-4 < ((rough - exact).abs().mean() / exact.std()).item() < 0.2
    with pytest.raises(Unsupported, match="float16 ends at 65504; use --dtype bfloat16"):
        load_model(checkpoint("flan_t5"), dtype="float16")


def changed(model: Model, kind: type, change) -> Model:
    """The model with every mixer of this very kind changed."""

    def layers(stack):
        def residual(step: Residual) -> Residual:
            return Residual(step.norm, *(change(m) if type(m) is kind else m for m in step.mixers), after=step.after)

        return tuple(replace(layer, steps=tuple(map(residual, layer.steps))) for layer in stack)

    encoder = replace(model.encoder, layers=layers(model.encoder.layers))
    return replace(model, encoder=encoder, decoder=replace(model.decoder, layers=layers(model.decoder.layers)))


def positioned(kind: type, **fields):
    """The model with these fields of its biases of positions replaced; `sided` makes them another kind."""

    def change(mixer):
        sided = fields.get("sided", type(mixer.position))
        numbers = {name: fields.get(name, getattr(mixer.position, name)) for name in ("name", "buckets", "distance")}
        return replace(mixer, position=sided(**numbers))

    return lambda model: changed(model, kind, change)


MUTATIONS = {
    "buckets of both sides in the decoder": positioned(Attention, sided=TwoSidedBias),
    "buckets of one side in the encoder": positioned(SourceAttention, sided=RelativeBias),
    "buckets to another distance in the decoder": positioned(Attention, distance=30),
    "buckets to another distance in the encoder": positioned(SourceAttention, distance=30),
    "the decoder's biases in the encoder": positioned(
        SourceAttention, name="decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    ),
    "no biases in the decoder": lambda model: changed(model, Attention, lambda mixer: replace(mixer, position=None)),
    "scaled scores in the encoder": lambda model: changed(model, SourceAttention, lambda mixer: replace(mixer, scale=None)),
    "scaled scores of the source": lambda model: changed(model, CrossAttention, lambda mixer: replace(mixer, scale=None)),
    "a tied head that is not scaled": lambda model: replace(
        model, decoder=replace(model.decoder, head=replace(model.decoder.head, scale=1.0))
    ),
    "the decoder's norm after the encoder": lambda model: replace(
        model, encoder=Encoder(model.encoder.layers, replace(model.encoder.norm, name="decoder.final_layer_norm"))
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees(mutation, checkpoint, monkeypatch):
    honest = models.read
    monkeypatch.setattr(models, "read", lambda folder: (honest(folder)[0], MUTATIONS[mutation](honest(folder)[1])))
    monkeypatch.setattr("kvrun.weights.load.Loader.audit", lambda *_: None)  # a tensor may go unread
    assert difference(checkpoint("t5")) > CLOSE


def difference(folder, change=lambda batch: batch) -> float:
    """How far the logits of two answers to `SOURCE` are from transformers', in standard deviations; `change` is of sources."""
    runner, asked = Runner(), [SOURCES[4], SOURCES[2]]
    runner.load(folder)
    encode = runner.model.encoder.forward
    object.__setattr__(runner.model.encoder, "forward", lambda batch, pool: encode(change(batch), pool))
    logits = runner.step(list(enumerate(asked)))
    model = oracle_model(folder)
    with torch.inference_mode():
        reference = torch.cat([ROWS["t5"].logits(model, torch.tensor([ids]))[0] for ids in asked])
    return distance(logits, reference)


def test_the_comparison_sees_a_source_whose_tokens_see_none_after_them(checkpoint):
    assert difference(checkpoint("t5")) < CLOSE < difference(checkpoint("t5"), lambda batch: replace(batch, reach=None))
