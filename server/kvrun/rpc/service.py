"""The calls of the wire, each a few lines over the engine. Steps and reservations run on the compute thread, adapters load beside it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import grpc

from kvrun.errors import KvrunError, ProtocolError, StaleEpoch
from kvrun.rpc import convert
from kvrun.rpc.compute import ComputeThread
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun.rpc.pb import model_shard_pb2_grpc as rpc

if TYPE_CHECKING:
    from kvrun.engine.engine import Engine, Grant

log = logging.getLogger("kvrun.rpc")


@dataclass(frozen=True)
class Identity:
    """What this shard is called."""

    model_id: str
    rank: int
    world: int


class Stream:
    """One open `Run` call: what the compute thread answers into and the call's own thread reads from."""

    def __init__(self) -> None:
        self.answers: SimpleQueue[pb.Outcome | BaseException | None] = SimpleQueue()
        self.ended = False  # set on the compute thread; steps that are still queued are dropped

    def end(self, reason: BaseException | None) -> None:
        """Say the last thing this stream says: an error, or None for a plain end."""
        if not self.ended:
            self.ended = True
            self.answers.put(reason)


class ModelShard(rpc.ModelShardServicer):
    """The service. Before `attach` every call is refused as UNAVAILABLE."""

    def __init__(self, identity: Identity, compute: ComputeThread, broken: Callable[[], None]) -> None:
        self._identity = identity
        self._compute = compute
        self._broken = broken  # called when this process can no longer keep step with its group
        self._engine: Engine | None = None
        self._epoch = 0
        self._stream: Stream | None = None
        self._loads = threading.BoundedSemaphore(4)

    def attach(self, engine: Engine) -> None:
        """Begin to serve a loaded engine."""
        self._engine = engine

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        """What this rank loaded."""
        engine, me = self._ready(context), self._identity
        return pb.Description(model_id=me.model_id, rank=me.rank, world=me.world, **engine.describe())

    def Reserve(self, request: pb.ReserveRequest, context: grpc.ServicerContext) -> pb.Reservation:
        """Begin an epoch."""
        engine = self._ready(context)
        try:
            grant = self._compute.call(lambda: self._begin(engine, request))
        except StaleEpoch as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Exception as error:
            self._abort(context, error)
        return pb.Reservation(pages=grant.pages, adapter_bytes=grant.adapter_bytes, captured=grant.captured)

    def Run(self, requests: Iterator[pb.Step], context: grpc.ServicerContext) -> Iterator[pb.Outcome]:
        """Answer steps until the caller ends the stream or an epoch does."""
        engine, stream = self._ready(context), Stream()
        threading.Thread(target=self._read, args=(engine, stream, requests), name="steps", daemon=True).start()
        while True:
            answer = stream.answers.get()
            if answer is None:
                return
            if isinstance(answer, BaseException):
                self._abort(context, answer)
            else:
                yield answer

    def LoadAdapter(self, request: pb.LoadAdapterRequest, context: grpc.ServicerContext) -> pb.LoadedAdapter:
        """Read an adapter beside running steps."""
        engine = self._ready(context)
        began = time.perf_counter()
        try:
            with self._loads:
                self._check(request.epoch)
                adapter = engine.adapters.load(request.handle, request.name, request.path)
                self._check(request.epoch)
        except Exception as error:
            self._abort(context, error)
        event = {"adapter": request.name, "digest": adapter.digest, "bytes": adapter.bytes}
        log.info("adapter loaded", extra={"fields": {**event, "ms": round((time.perf_counter() - began) * 1e3, 1)}})
        return pb.LoadedAdapter(
            digest=adapter.digest,
            bytes=adapter.bytes,
            matched=adapter.matched,
            rank_min=min(adapter.ranks),
            rank_max=max(adapter.ranks),
            targets=adapter.targets,
        )

    def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: grpc.ServicerContext) -> pb.UnloadedAdapter:
        """Free an adapter."""
        engine = self._ready(context)
        try:
            self._check(request.epoch)
            engine.adapters.unload(request.handle)
        except Exception as error:
            self._abort(context, error)
        return pb.UnloadedAdapter()

    def _begin(self, engine: Engine, request: pb.ReserveRequest) -> Grant:
        """On the compute thread: end the last epoch's stream, then reserve."""
        if request.epoch <= self._epoch:
            raise StaleEpoch(f"epoch {request.epoch} was asked for; this shard has seen {self._epoch} and takes only newer ones")
        if self._stream is not None:
            self._stream.end(StaleEpoch(f"epoch {request.epoch} began"))
            self._stream = None
        self._epoch = request.epoch
        return engine.reserve(request.pages, request.step_tokens, request.sequences, request.adapter_bytes)

    def _read(self, engine: Engine, stream: Stream, requests: Iterator[pb.Step]) -> None:
        """On a thread of the stream: queue each step as it comes, so that the next one is here when the last is done."""
        try:
            for message in requests:
                arrived = time.perf_counter_ns()
                self._compute.post(partial(self._answer, engine, stream, message, arrived))
        except grpc.RpcError:
            pass  # the caller is gone; it says so by this
        self._compute.post(partial(stream.end, None))

    def _answer(self, engine: Engine, stream: Stream, message: pb.Step, arrived: int) -> None:
        """On the compute thread: run a step and answer it, or end the stream with what went wrong."""
        if stream.ended:
            return
        try:
            self._check(message.epoch)
            if self._stream is not stream:
                if self._stream is not None:
                    raise ProtocolError(f"epoch {message.epoch} has a step stream already")
                self._stream = stream
            outcome = engine.step(convert.to_step(message))
        except Exception as error:
            stream.end(error)
            if not isinstance(error, KvrunError):
                log.exception("step failed", extra={"fields": {"epoch": message.epoch, "step": message.number}})
                if self._identity.world > 1:
                    self._broken()  # other ranks may wait in a collective that this one left
            return
        stream.answers.put(convert.from_outcome(message.epoch, outcome, (time.perf_counter_ns() - arrived) // 1000))

    def _ready(self, context: grpc.ServicerContext) -> Engine:
        engine = self._engine
        if engine is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the model is still loading; ask the health service when it is done")
        assert engine is not None, "abort does not return"
        return engine

    def _check(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise StaleEpoch(f"this call belongs to epoch {epoch}; the shard is in epoch {self._epoch}")

    def _abort(self, context: grpc.ServicerContext, error: BaseException) -> None:
        code = convert.status(error)
        context.abort(code, str(error) if isinstance(error, KvrunError) else f"{type(error).__name__}: {error}")
