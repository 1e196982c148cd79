"""The life of a shard process: bind, load, serve, and end when told to or when nobody is left to serve."""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvrun.errors import ConfigError, KvrunError, OutOfMemory, is_out_of_memory
from kvrun.rpc.compute import ComputeThread
from kvrun.rpc.pb import model_shard_pb2_grpc as rpc
from kvrun.rpc.service import Identity, ModelShard

if TYPE_CHECKING:
    from kvrun.engine.engine import Engine

log = logging.getLogger("kvrun")

SERVICES = ("", "kvrun.v1.ModelShard")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
# Calls that wait inside the server at once: a step stream or two, health watchers, adapter loads.
CALLS = 24
UNBOUNDED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
BUG = 70


def run(socket: Path, identity: Identity, death_fd: int | None, load: Callable[[], Engine]) -> int:
    """Serve at `socket` until a signal, the parent's death or a failure ends the process. Does not return.

    The socket answers at once, as NOT_SERVING; `load` runs on the compute thread.
    """
    faulthandler.enable()  # a watchdog's SIGABRT leaves the stacks of all threads
    verdict: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: verdict.put(0))
    if death_fd is not None:
        _watch(death_fd)
    compute = ComputeThread()
    shard = ModelShard(identity, compute, broken=lambda: verdict.put(BUG))
    server, checks = _bind(socket, shard)

    def begin() -> None:
        code = _load(load, shard)
        if code:
            verdict.put(code)
            return
        for service in SERVICES:
            checks.set(service, SERVING)
        log.info("ready", extra={"fields": {"socket": str(socket)}})

    compute.post(begin)
    code = verdict.get()
    server.stop(grace=0.2 if code else 0).wait(0.5)
    socket.unlink(missing_ok=True)
    logging.shutdown()
    # Threads may be deep in a kernel or a collective; nothing they hold outlives the process.
    os._exit(code)


def _load(load: Callable[[], Engine], shard: ModelShard) -> int:
    """Load and attach; the exit code if that fails, else 0."""
    try:
        shard.attach(load())
    except KvrunError as error:
        log.error(str(error))
        return error.exit_code
    except Exception as error:
        if is_out_of_memory(error):
            log.error("the model does not fit into memory: %s", error)
            return OutOfMemory.exit_code
        log.exception("the model could not be loaded")
        return BUG
    return 0


def _bind(socket: Path, shard: ModelShard) -> tuple[grpc.Server, health.HealthServicer]:
    server = grpc.server(ThreadPoolExecutor(CALLS, thread_name_prefix="call"), options=UNBOUNDED)
    checks = health.HealthServicer(experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(2))
    for service in SERVICES:
        checks.set(service, NOT_SERVING)
    rpc.add_ModelShardServicer_to_server(shard, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    socket = socket.absolute()
    if socket.is_socket():
        socket.unlink()  # a dead process left it: the run directory belongs to one launcher
    mask = os.umask(0o177)  # the socket is born 0600
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError as error:
        raise ConfigError(f"--uds-path {socket} cannot be bound: {error}; its folder must exist and the path be under 108 bytes") from error
    finally:
        os.umask(mask)
    server.start()
    return server, checks


def _watch(death_fd: int) -> None:
    """End the process when the other end of the pipe closes or the parent changes, whichever is seen first."""
    parent = os.getppid()
    try:
        os.fstat(death_fd)
    except OSError as error:
        raise ConfigError(f"KVRUN_DEATH_FD is {death_fd}, which is not open: {error}") from error

    def wait() -> None:
        while os.getppid() == parent:
            readable, _, _ = select.select([death_fd], [], [], 1.0)
            if readable and not os.read(death_fd, 1):
                break
        print("the launcher is gone; so is this shard", file=sys.stderr, flush=True)
        os._exit(0)

    threading.Thread(target=wait, name="death-pipe", daemon=True).start()
