"""The shard over its real socket: epochs, steps, adapters beside steps, errors with their status, and its end."""

import json
import os
import shutil
import signal
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from adapters import edit_config
from driver import Driver
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Row, Step
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun.rpc.service import Identity, ModelShard
from wire import SERVING, Shard, group

PROMPT = [5, 99, 31, 7, 200, 41, 18, 6, 77, 150, 3]
WARM = Sampling(temperature=1.0, top_p=0.9, seed=5, top_logprobs=2)
EPOCHS = count(1)


@pytest.fixture(scope="module")
def shard(checkpoint, tmp_path_factory):
    with group(checkpoint("llama"), tmp_path_factory.mktemp("run"), 1) as (shard,):
        yield shard


@pytest.fixture
def epoch(shard):
    """A fresh epoch of the shard."""
    number = next(EPOCHS)
    shard.reserve(number)
    return number


def failure(call) -> tuple[grpc.StatusCode, str]:
    """The status and message that a call fails with."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()


def load(shard, epoch, handle, path) -> pb.LoadedAdapter:
    return shard.calls.LoadAdapter(pb.LoadAdapterRequest(epoch=epoch, handle=handle, name=f"adapter{handle}", path=str(path)))


def test_describe_says_what_was_loaded(shard):
    said = shard.calls.Describe(pb.DescribeRequest())
    assert (said.model_id, said.architecture, said.dtype, said.device) == ("tiny", "LlamaForCausalLM", "float32", "cpu")
    assert (said.rank, said.world, said.vocabulary, said.positions, said.page_tokens) == (0, 1, 259, 512, 4)
    assert said.threads == 1  # as `--num-threads` says
    assert said.page_bytes == 2 * 2 * 2 * 16 * 4 * 4 and list(said.end_tokens) == [2] and len(said.model_digest) == 64
    assert "q_proj" in said.lora_targets and said.kernels["paged_attention"] and list(said.state_kinds) == ["pages"]


def test_the_socket_is_private_and_health_knows_both_names(shard):
    assert stat.S_IMODE(os.stat(shard.socket).st_mode) == 0o600
    assert shard.status("") == shard.status() == SERVING


def test_answers_over_the_wire_are_those_of_the_engine(shard, epoch, engines):
    prompts = [PROMPT[:n] for n in (1, 6, 11)]

    def run(step) -> dict:
        driver = Driver(step)
        for index, prompt in enumerate(prompts):
            driver.add(index, prompt, 9, WARM if index else Sampling(prompt_logprobs=True))
        driver.run(chunk=4)
        return {index: [token.id for token in said] for index, said in driver.details.items()} | driver.answers

    assert run(shard.run(epoch).step) == run(engines().step)


def test_a_step_may_be_sent_before_the_last_one_is_answered(shard, epoch):
    driver = Driver(shard.run(epoch).step)
    driver.add(1, PROMPT, 6, WARM)
    wanted = driver.run()[1]
    epoch = next(EPOCHS)
    shard.reserve(epoch)
    steps = shard.run(epoch)
    steps.send(Step(1, [], [Admit(1, PROMPT, len(PROMPT), WARM, 0)], [Row(1, 0, len(PROMPT), list(range(6)), True, [])]))
    for number in range(2, 7):
        steps.send(Step(number, [], [], [Row(1, len(PROMPT) + number - 2, 1, [], True, [])]))
    outcomes = [steps.receive() for _ in range(6)]
    assert [outcome.number for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    assert [outcome.rows[0].tokens[0].id for outcome in outcomes] == wanted


def test_a_new_epoch_forgets_everything_and_ends_the_old_stream(shard, epoch, adapter):
    steps = shard.run(epoch)
    load(shard, epoch, 1, adapter("rank1"))
    steps.step(Step(1, [], [Admit(1, PROMPT, len(PROMPT), WARM, 1)], []))
    newer = next(EPOCHS)
    assert shard.reserve(newer).pages == 600
    assert failure(steps.receive)[0] == grpc.StatusCode.ABORTED
    assert failure(lambda: load(shard, epoch, 2, adapter("rank1")))[0] == grpc.StatusCode.ABORTED
    steps = shard.run(newer)
    steps.step(Step(1, [], [Admit(1, PROMPT, len(PROMPT), WARM, 0)], []))
    code, said = failure(lambda: steps.step(Step(2, [], [Admit(2, PROMPT, len(PROMPT), WARM, 1)], [])))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "handle 1 is not resident" in said


def test_an_epoch_that_is_not_newer_is_refused(shard, epoch):
    for old in (epoch, epoch - 1, 0):
        code, said = failure(lambda old=old: shard.reserve(old))
        assert code == grpc.StatusCode.FAILED_PRECONDITION and f"has seen {epoch}" in said


def test_a_step_of_another_epoch_is_aborted(shard, epoch):
    assert failure(lambda: shard.run(epoch + 50).step(Step(1, [], [], [])))[0] == grpc.StatusCode.ABORTED


def test_a_second_stream_of_an_epoch_is_refused(shard, epoch):
    first = shard.run(epoch)
    first.step(Step(1, [], [], []))
    code, said = failure(lambda: shard.run(epoch).step(Step(2, [], [], [])))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "stream already" in said
    assert first.step(Step(2, [], [], [])).number == 2


def test_a_broken_rule_ends_the_stream_and_the_next_epoch_serves(shard, epoch):
    code, said = failure(lambda: shard.run(epoch).step(Step(5, [], [], [])))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and said == "step 5 came after step 0"
    wrong = pb.Step(
        epoch=epoch, number=1, admit=[pb.Admit(sequence=1, tokens=[5], prompt_tokens=1, sampling=pb.Sampling(top_p=float("nan")))]
    )
    epoch = next(EPOCHS)
    shard.reserve(epoch)
    wrong.epoch = epoch
    code, said = failure(lambda: next(shard.calls.Run(iter([wrong]))))
    assert code == grpc.StatusCode.INVALID_ARGUMENT and "sampling.top_p" in said
    epoch = next(EPOCHS)
    shard.reserve(epoch)
    assert shard.run(epoch).step(Step(1, [], [], [])).number == 1


def test_more_pages_than_fit_are_refused_and_fewer_then_granted(shard):
    code, said = failure(lambda: shard.reserve(next(EPOCHS), pages=1 << 40))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "--kv-cache-bytes" in said
    assert shard.reserve(next(EPOCHS)).pages == 600


def test_adapters_load_beside_steps_and_say_what_matched(shard, epoch, adapter):
    driver = Driver(shard.run(epoch).step)
    driver.add(1, PROMPT, 60)
    driver.turn()
    with ThreadPoolExecutor(2) as others:
        loads = [others.submit(load, shard, epoch, handle, adapter(name)) for handle, name in ((1, "patterns"), (2, "rank1"))]
        while not all(done.done() for done in loads):
            assert driver.running, "the answer ended before the adapters were loaded"
            driver.turn()
    said = loads[0].result()
    assert (said.matched, said.rank_min, said.rank_max, len(said.targets), len(said.digest)) == (28, 2, 7, 7, 64)
    driver.add(2, PROMPT, 5, adapter=1)
    driver.add(3, PROMPT, 5, adapter=2)
    answers = driver.run()
    assert len({tuple(answers[sequence][:5]) for sequence in (1, 2, 3)}) == 3
    for _ in range(2):
        shard.calls.UnloadAdapter(pb.UnloadAdapterRequest(epoch=epoch, handle=1))


def test_a_thread_that_reads_an_adapter_computes_where_the_model_lies():
    begun, adapter = [], SimpleNamespace(digest="", bytes=1, matched=2, ranks=(3,), targets=("q_proj",), pages=0)
    engine = SimpleNamespace(
        model=SimpleNamespace(device=SimpleNamespace(begin=lambda: begun.append(threading.get_ident()))),
        adapters=SimpleNamespace(load=lambda *_: adapter if begun == [threading.get_ident()] else None),
    )
    service = ModelShard(Identity("tiny", 1, 2), None, lambda: None)
    said = service._loads.submit(service._load, engine, pb.LoadAdapterRequest(epoch=service._epoch, handle=1)).result()
    assert said.matched == 2 and begun != [threading.get_ident()]


@pytest.mark.parametrize(
    ("spoil", "code", "named"),
    [
        (lambda folder: shutil.rmtree(folder), grpc.StatusCode.NOT_FOUND, "adapter7: adapter folder"),
        (lambda folder: edit_config(folder, use_dora=True), grpc.StatusCode.INVALID_ARGUMENT, "use_dora"),
        (lambda folder: edit_config(folder, r=5), grpc.StatusCode.INVALID_ARGUMENT, "q_proj.lora_A"),
    ],
    ids=["missing", "config", "shape"],
)
def test_an_unfit_adapter_has_its_own_status_and_disturbs_nothing(spoil, code, named, shard, epoch, adapter, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(adapter("rank1"), copy)
    spoil(copy)
    found, said = failure(lambda: load(shard, epoch, 7, copy))
    assert found == code and named in said
    assert shard.run(epoch).step(Step(1, [], [], [])).number == 1


def test_a_router_that_leaves_is_forgotten(shard, epoch):
    steps = shard.run(epoch)
    steps.step(Step(1, [], [Admit(1, PROMPT, len(PROMPT), WARM, 0)], []))
    steps.outcomes.cancel()
    newer = next(EPOCHS)
    shard.reserve(newer)
    assert shard.run(newer).step(Step(1, [], [Admit(1, PROMPT, len(PROMPT), WARM, 0)], [])).number == 1


def test_two_ranks_answer_as_one(checkpoint, tmp_path, engines, adapter):
    def run(step) -> dict:
        driver = Driver(step)
        driver.add(1, PROMPT, 8, WARM)
        driver.add(2, PROMPT[:5], 8, adapter=1)
        return driver.run(chunk=4)

    with group(checkpoint("llama"), tmp_path, 2) as shards, ThreadPoolExecutor(2) as both:
        list(both.map(lambda shard: shard.reserve(1), shards))
        digests = {said.digest for said in both.map(lambda shard: load(shard, 1, 1, adapter("rank8")), shards)}
        streams = [shard.run(1) for shard in shards]

        def step(message: Step):
            first, second = both.map(lambda stream: stream.step(message), streams)
            assert second.number == first.number and not second.rows
            return first

        found = run(step)
        assert len(digests) == 1
    ranks = engines("llama", 2)
    ranks.load(1, adapter("rank8"))
    assert found == run(ranks.step)


def test_sigterm_ends_it_at_once_with_code_0_even_while_loading(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")  # nobody writes into it, so whoever reads it loads for ever
    shard = Shard(folder, tmp_path / "shard")
    try:
        assert shard.status() != SERVING  # the socket answers before torch is imported
        assert failure(lambda: shard.calls.Describe(pb.DescribeRequest()))[0] == grpc.StatusCode.UNAVAILABLE
        shard.process.send_signal(signal.SIGTERM)
        assert shard.process.wait(60) == 0
        assert not shard.socket.exists()
    finally:
        shard.end()


def test_it_dies_with_its_parent_and_leaves_stacks_when_aborted(checkpoint, tmp_path):
    read, write = os.pipe()
    orphan = Shard(checkpoint("llama"), tmp_path / "orphan", env={"KVRUN_DEATH_FD": str(read)}, pass_fds=[read])
    aborted = Shard(checkpoint("llama"), tmp_path / "aborted")
    try:
        for shard in (orphan, aborted):
            shard.status()
        os.close(write)
        assert orphan.process.wait(10) == 0
        aborted.ready()
        aborted.process.send_signal(signal.SIGABRT)
        _, said = aborted.process.communicate(timeout=20)
        assert aborted.process.returncode == -signal.SIGABRT and "Current thread" in said and "compute.py" in said
        where, ready = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
        assert where["target"] == "kvrun.device" and where["device"] == "cpu" and "rms_norm" in where["kernels"]
        assert "1 thread on processors " in where["message"]
        assert (ready["level"], ready["message"], ready["target"]) == ("INFO", "ready", "kvrun")
    finally:
        orphan.end()
        aborted.end()
        os.close(read)
