"""The calls of the wire, each a few lines over the engine. Steps and reservations run on the compute thread, adapters load beside it.

On a device that computes while the host goes on, a step that is here is launched before the outcome of the one before is taken, which
happens as soon as that has landed or the next one's layers are under way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from grpclib import GRPCError, Status

from kvrun.errors import KvrunError, ProtocolError, StaleEpoch
from kvrun.rpc import convert
from kvrun.rpc.compute import ComputeThread
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun.rpc.pb.model_shard_grpc import ModelShardBase

if TYPE_CHECKING:
    from grpclib.server import Stream

    from kvrun.engine.engine import Engine, Grant
    from kvrun.engine.turn import Turn

log = logging.getLogger("kvrun.rpc")

LOADS = 4  # adapters that are read at once


@dataclass(frozen=True)
class Identity:
    """What this shard is called."""

    model_id: str
    rank: int
    world: int


class Steps:
    """One open `Run` call: what the compute thread answers into and the call reads from."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[pb.Outcome | BaseException | None] = asyncio.Queue()
        self.ended = False  # set on the compute thread; steps that are still queued are dropped

    def answer(self, answer: pb.Outcome | BaseException | None) -> None:
        """Hand over what is next, from the compute thread."""
        self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)

    def end(self, reason: BaseException | None) -> None:
        """Say the last thing this stream says: an error, or None for a plain end."""
        if not self.ended:
            self.ended = True
            self.answer(reason)

    async def next(self) -> pb.Outcome | None:
        """The next outcome, None at the end; raises what ended the stream."""
        answer = await self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer


@dataclass(frozen=True)
class Launched:
    """A step whose outcome is not answered yet."""

    turn: Turn
    steps: Steps
    number: int
    arrived: int  # ns


class ModelShard(ModelShardBase):
    """The service. Before `attach` every call is refused as UNAVAILABLE."""

    def __init__(self, identity: Identity, compute: ComputeThread, broken: Callable[[], object]) -> None:
        self._identity = identity
        self._compute = compute
        self._broken = broken  # called when this process can no longer keep step with its group
        self._engine: Engine | None = None
        self._epoch = 0
        self._steps: Steps | None = None
        self._launched: Launched | None = None  # the last step, while it is not answered
        self._loads = ThreadPoolExecutor(LOADS, thread_name_prefix="adapter")

    def attach(self, engine: Engine) -> None:
        """Begin to serve a loaded engine."""
        self._engine = engine

    async def Describe(self, stream: Stream[pb.DescribeRequest, pb.Description]) -> None:
        """What this rank loaded."""

        async def answer(engine: Engine, request: pb.DescribeRequest) -> pb.Description:
            me = self._identity
            return pb.Description(model_id=me.model_id, rank=me.rank, world=me.world, **engine.describe())

        await self._call(stream, answer)

    async def Reserve(self, stream: Stream[pb.ReserveRequest, pb.Reservation]) -> None:
        """Begin an epoch."""

        async def answer(engine: Engine, request: pb.ReserveRequest) -> pb.Reservation:
            try:
                grant = await asyncio.wrap_future(self._compute.call(partial(self._begin, engine, request)))
            except StaleEpoch as error:
                raise GRPCError(Status.FAILED_PRECONDITION, str(error)) from error
            return pb.Reservation(pages=grant.pages, adapter_bytes=grant.adapter_bytes, captured=grant.captured)

        await self._call(stream, answer)

    async def Run(self, stream: Stream[pb.Step, pb.Outcome]) -> None:
        """Answer steps until the caller ends the stream or an epoch does."""
        engine, steps = self._ready(), Steps()
        reading = asyncio.ensure_future(self._read(engine, steps, stream))
        try:
            while (outcome := await steps.next()) is not None:
                await stream.send_message(outcome)
        except Exception as error:
            raise _failure(error) from error
        finally:
            reading.cancel()
            self._compute.post(partial(self._end, steps))  # the caller may be gone: what it had sent is of no use

    async def LoadAdapter(self, stream: Stream[pb.LoadAdapterRequest, pb.LoadedAdapter]) -> None:
        """Read an adapter beside running steps."""

        async def answer(engine: Engine, request: pb.LoadAdapterRequest) -> pb.LoadedAdapter:
            return await asyncio.get_running_loop().run_in_executor(self._loads, self._load, engine, request)

        await self._call(stream, answer)

    async def UnloadAdapter(self, stream: Stream[pb.UnloadAdapterRequest, pb.UnloadedAdapter]) -> None:
        """Free an adapter."""

        async def answer(engine: Engine, request: pb.UnloadAdapterRequest) -> pb.UnloadedAdapter:
            self._check(request.epoch)
            engine.adapters.unload(request.handle)
            return pb.UnloadedAdapter()

        await self._call(stream, answer)

    async def _call(self, stream: Stream[Any, Any], answer: Callable[[Engine, Any], Awaitable[Any]]) -> None:
        """One request, one answer."""
        engine = self._ready()
        request = await stream.recv_message()
        try:
            reply = await answer(engine, request)
        except Exception as error:
            raise _failure(error) from error
        await stream.send_message(reply)

    def _load(self, engine: Engine, request: pb.LoadAdapterRequest) -> pb.LoadedAdapter:
        """On a thread for adapters: read one for the epoch that asked for it."""
        began = time.perf_counter()
        self._check(request.epoch)
        engine.model.device.begin()  # every thread begins on the first device
        adapter = engine.adapters.load(request.handle, request.name, request.path)
        self._check(request.epoch)
        event = {"adapter": request.name, "digest": adapter.digest, "bytes": adapter.bytes}
        log.info("adapter loaded", extra={"fields": {**event, "ms": round((time.perf_counter() - began) * 1e3, 1)}})
        return pb.LoadedAdapter(
            digest=adapter.digest,
            bytes=adapter.bytes,
            matched=adapter.matched,
            rank_min=min(adapter.ranks),
            rank_max=max(adapter.ranks),
            targets=adapter.targets,
            pages=adapter.pages,
        )

    def _begin(self, engine: Engine, request: pb.ReserveRequest) -> Grant:
        """On the compute thread: end the last epoch's stream, then reserve."""
        if request.epoch <= self._epoch:
            raise StaleEpoch(f"epoch {request.epoch} was asked for; this shard has seen {self._epoch} and takes only newer ones")
        if self._steps is not None:
            self._steps.end(StaleEpoch(f"epoch {request.epoch} began"))
            self._steps = self._launched = None
        self._epoch = request.epoch
        return engine.reserve(request.pages, request.step_tokens, request.sequences, request.adapter_bytes)

    async def _read(self, engine: Engine, steps: Steps, stream: Stream[pb.Step, pb.Outcome]) -> None:
        """Queue each step as it comes, so that the next one is here when the last is done."""
        async for message in stream:
            self._compute.post(partial(self._answer, engine, steps, message, time.perf_counter_ns()))
        self._compute.post(partial(self._end, steps))

    def _answer(self, engine: Engine, steps: Steps, message: pb.Step, arrived: int) -> None:
        """On the compute thread: launch a step, answer the one before, or end the stream with what went wrong."""
        if steps.ended:
            return
        try:
            self._check(message.epoch)
            if self._steps is not steps:
                if self._steps is not None:
                    raise ProtocolError(f"epoch {message.epoch} has a step stream already")
                self._steps = steps
            try:
                turn = engine.launch(convert.to_step(message), self._tell)
            finally:
                self._tell()  # of a step that was refused or failed, the one before is answered all the same
        except Exception as error:
            self._fail(steps, message.number, error)
            return
        self._launched = launched = Launched(turn, steps, message.number, arrived)
        if turn.landed:
            self._land(launched)
        else:
            self._compute.after(turn.wait, partial(self._land, launched))

    def _land(self, launched: Launched) -> None:
        """On the compute thread: answer a step that has landed, unless it was answered or is not asked for any more."""
        if self._launched is launched:
            try:
                self._tell()
            except Exception as error:
                self._fail(launched.steps, launched.number, error)

    def _tell(self) -> None:
        """On the compute thread: answer the last step that was launched, when it is done, unless it was answered."""
        launched, self._launched = self._launched, None
        if launched is not None and not launched.steps.ended:
            outcome = launched.turn.outcome()
            launched.steps.answer(convert.from_outcome(self._epoch, outcome, (time.perf_counter_ns() - launched.arrived) // 1000))

    def _end(self, steps: Steps) -> None:
        """On the compute thread: end a stream of which no further step comes."""
        if self._launched is not None and self._launched.steps is steps:
            self._land(self._launched)
        steps.end(None)

    def _fail(self, steps: Steps, number: int, error: Exception) -> None:
        """On the compute thread: end a stream with an error, and the process where others may wait for it."""
        steps.end(error)
        if not isinstance(error, KvrunError):
            log.error("step failed", exc_info=error, extra={"fields": {"epoch": self._epoch, "step": number}})
            if self._identity.world > 1:
                self._broken()  # other ranks may wait in a collective that this one left

    def _ready(self) -> Engine:
        if self._engine is None:
            raise GRPCError(Status.UNAVAILABLE, "the model is still loading; ask the health service when it is done")
        return self._engine

    def _check(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise StaleEpoch(f"this call belongs to epoch {epoch}; the shard is in epoch {self._epoch}")


def _failure(error: Exception) -> GRPCError:
    """What a call answers that failed by `error`."""
    if isinstance(error, GRPCError):
        return error
    return GRPCError(convert.status(error), str(error) if isinstance(error, KvrunError) else f"{type(error).__name__}: {error}")
