"""The shard over its real socket, on a device that computes while the host goes on: outcomes leave in order, as soon as they are there."""

import asyncio
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import grpc
import pytest
from driver import PAGE_TOKENS, Driver
from elsewhere import gpus, need, settle
from grpclib.health.check import ServiceStatus
from kvrun.device import Cuda
from kvrun.dist import Group
from kvrun.engine.engine import Engine
from kvrun.engine.memory import MemoryBudget
from kvrun.engine.sampling import Sampling
from kvrun.engine.sequence import Admit, Row, Step
from kvrun.nn.build import load_model
from kvrun.nn.loaded import LoadedModel
from kvrun.rpc.compute import ComputeThread
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun.rpc.pb import model_shard_pb2_grpc as rpc
from kvrun.rpc.process import listen
from kvrun.rpc.service import Identity, ModelShard
from kvrun.underway import Flight
from wire import Steps

PROMPT = [5, 99, 31, 7]
ADMIT = Admit(1, PROMPT, len(PROMPT), Sampling(), 0)
FIRST = Step(1, [], [ADMIT], [Row(1, 0, len(PROMPT), [0, 1, 2], True, [])])


def further(number: int) -> Step:
    """The step of one token that follows FIRST as number `number`."""
    return Step(number, [], [], [Row(1, len(PROMPT) + number - 2, 1, [], True, [])])


class Shard:
    """A shard of this process and a client of it; what lands waits for `let`."""

    def __init__(self, engine: Engine, compute: ComputeThread, socket) -> None:
        self.flights: list[Flight] = []
        self.let: defaultdict[int, Event] = defaultdict(Event)  # by number of the landing
        self.forwards = 0
        self.shard = ModelShard(Identity("tiny", 0, 1), compute, broken=lambda: None)
        self.shard.attach(engine)
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, daemon=True).start()
        self.server = self._do(listen(socket, self.shard, ServiceStatus()))
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self.calls = rpc.ModelShardStub(self.channel)
        self.epoch = 0

    def run(self) -> Steps:
        """Begin an epoch, and open its stream."""
        self.epoch += 1
        self.calls.Reserve(pb.ReserveRequest(epoch=self.epoch, pages=64, step_tokens=64, sequences=8, adapter_bytes=1 << 20))
        self.flights.clear()
        return Steps(self, self.epoch)

    def flow(self) -> None:
        """Let everything land that comes."""
        for number in range(100):
            self.let[number].set()

    def end(self) -> None:
        self.flow()
        self.channel.close()
        self._loop.call_soon_threadsafe(self.server.close)

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


@pytest.fixture
def shard(checkpoint, tmp_path, monkeypatch):
    need("stand-in")
    compute = ComputeThread()

    def load() -> Engine:
        settle()
        model = load_model(checkpoint("llama"), dtype="float32", group=Group.single(), device=Cuda(0))
        return Engine(model, Group.single(), MemoryBudget(1 << 26, 1 << 26), PAGE_TOKENS)

    with gpus(1):
        shard = Shard(compute.call(load).result(), compute, tmp_path / "socket")
        fetch, wait, forward = Cuda.fetch, Flight.wait, LoadedModel.forward

        def fetched(self, made):
            shard.flights.append(fetch(self, made))
            return shard.flights[-1]

        def waited(self):
            number = next((number for number, flight in enumerate(shard.flights, start=1) if flight is self), None)
            if number is not None:
                assert shard.let[number].wait(60)
            wait(self)

        def launched(self, *given):
            shard.forwards += 1
            return forward(self, *given)

        monkeypatch.setattr(Cuda, "fetch", fetched)
        monkeypatch.setattr(Flight, "wait", waited)
        monkeypatch.setattr(LoadedModel, "forward", launched)
        try:
            yield shard
        finally:
            shard.end()


def soon(what) -> None:
    """Wait until that is so."""
    for _ in range(3000):
        if what():
            return
        Event().wait(0.01)
    raise AssertionError("it never came to that")


def test_an_outcome_leaves_while_the_step_after_it_runs(shard):
    steps = shard.run()
    with ThreadPoolExecutor(1) as thread:
        steps.send(FIRST)
        steps.send(further(2))
        soon(lambda: shard.forwards == 2)  # the second was launched, and nothing of the first has landed
        first = thread.submit(steps.receive)
        assert not first.done()
        shard.let[1].set()
        assert first.result(30).number == 1
        second = thread.submit(steps.receive)
        steps.send(further(3))
        soon(lambda: shard.forwards == 3)
        assert not second.done()
        shard.let[2].set()
        assert second.result(30).number == 2
        shard.let[3].set()
        assert steps.receive().number == 3


def test_answers_are_those_of_steps_one_at_a_time_and_each_leaves_without_a_next(shard):
    shard.flow()
    driver = Driver(shard.run().step, pages=64)
    driver.add(1, PROMPT, 6)
    wanted = driver.run()[1]  # each step was sent when the one before was answered
    steps = shard.run()
    steps.send(FIRST)
    for number in range(2, 7):
        steps.send(further(number))
    outcomes = [steps.receive() for _ in range(6)]
    assert [outcome.number for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    assert [outcome.rows[0].tokens[0].id for outcome in outcomes] == wanted


def test_a_stream_that_its_caller_ends_is_answered_first(shard):
    steps = shard.run()
    steps.send(FIRST)
    steps.close()
    soon(lambda: shard.forwards == 1)
    shard.let[1].set()
    assert steps.receive().number == 1
    with pytest.raises(StopIteration):
        steps.receive()


def test_a_step_is_answered_before_the_next_is_refused(shard):
    steps = shard.run()
    steps.send(FIRST)
    steps.send(further(7))
    soon(lambda: shard.forwards == 1)
    shard.let[1].set()
    assert steps.receive().number == 1
    with pytest.raises(grpc.RpcError) as error:
        steps.receive()
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and error.value.details() == "step 7 came after step 1"


def test_what_goes_wrong_on_the_device_ends_the_stream_when_it_is_waited_for(shard, monkeypatch):
    wait = Flight.wait

    def broken(self):
        wait(self)
        if len(shard.flights) > 1 and self is shard.flights[1]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Flight, "wait", broken)
    shard.flow()
    steps = shard.run()
    assert steps.step(FIRST).number == 1
    with pytest.raises(grpc.RpcError) as error:
        steps.step(further(2))
    assert error.value.code() == grpc.StatusCode.INTERNAL and "illegal memory access" in error.value.details()


def test_a_new_epoch_drops_the_step_that_is_under_way(shard):
    old = shard.run()
    old.send(FIRST)
    soon(lambda: shard.forwards == 1)
    steps = shard.run()
    with pytest.raises(grpc.RpcError) as error:
        old.receive()
    assert error.value.code() == grpc.StatusCode.ABORTED
    shard.flow()
    assert steps.step(FIRST).number == 1 and steps.step(further(2)).number == 2
