"""The life of a shard process: bind, load, serve, and end when told to or when nobody is left to serve.

Nothing here wakes by the clock: a shard without work sleeps until a call, a signal or its parent's death.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from grpclib.config import Configuration
from grpclib.health.check import ServiceStatus
from grpclib.health.service import Health
from grpclib.server import Server

from kvrun.errors import ConfigError, KvrunError, OutOfMemory, is_out_of_memory
from kvrun.rpc.compute import ComputeThread
from kvrun.rpc.service import Identity, ModelShard

if TYPE_CHECKING:
    from kvrun.engine.engine import Engine

log = logging.getLogger("kvrun")

WINDOW = 64 << 20  # bytes on their way to this shard: the largest message that the router sends
LAST_WORDS_S = 0.2  # for answers that say why the process ends
BUG = 70


def run(socket: Path, identity: Identity, death_fd: int | None, load: Callable[[], Engine]) -> int:
    """Serve at `socket` until a signal, the parent's death or a failure ends the process. Does not return.

    The socket answers at once, as NOT_SERVING; `load` runs on the compute thread.
    """
    faulthandler.enable()  # a watchdog's SIGABRT leaves the stacks of all threads
    logging.getLogger("grpclib").setLevel(logging.ERROR)  # it tells of every call that a caller gave up
    code = asyncio.run(_live(socket, identity, death_fd, load))
    logging.shutdown()
    # Threads may be deep in a kernel or a collective; nothing they hold outlives the process.
    os._exit(code)


async def _live(socket: Path, identity: Identity, death_fd: int | None, load: Callable[[], Engine]) -> int:
    """From the first call that is answered to the exit code."""
    loop = asyncio.get_running_loop()
    verdict: asyncio.Future[int] = loop.create_future()

    def end(code: int) -> None:
        if not verdict.done():
            verdict.set_result(code)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, 0)
    if death_fd is not None:
        _watch(loop, death_fd)
    compute, serving = ComputeThread(), ServiceStatus()
    shard = ModelShard(identity, compute, broken=lambda: loop.call_soon_threadsafe(end, BUG))
    server = await listen(socket, shard, serving)

    def ready() -> None:
        serving.set(True)
        log.info("ready", extra={"fields": {"socket": str(socket)}})

    def begin() -> None:
        code = _load(load, shard)
        loop.call_soon_threadsafe(*((end, code) if code else (ready,)))

    compute.post(begin)
    code = await verdict
    if code:
        await asyncio.sleep(LAST_WORDS_S)
    server.close()
    socket.unlink(missing_ok=True)
    return code


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


async def listen(socket: Path, shard: ModelShard, serving: ServiceStatus) -> Server:
    """A server of the calls and of health, which `serving` decides, at a socket that only this user may open."""
    serving.set(False)
    windows = Configuration(http2_connection_window_size=WINDOW, http2_stream_window_size=WINDOW)
    server = Server([shard, Health({shard: [serving]})], config=windows)
    socket = socket.absolute()
    if socket.is_socket():
        socket.unlink()  # a dead process left it: the run directory belongs to one launcher
    mask = os.umask(0o177)  # the socket is born 0600
    try:
        await server.start(path=str(socket))
    except OSError as error:
        raise ConfigError(f"--uds-path {socket} cannot be bound: {error}; its folder must exist and the path be under 108 bytes") from error
    finally:
        os.umask(mask)
    return server


def _watch(loop: asyncio.AbstractEventLoop, death_fd: int) -> None:
    """End the process when the other end of the pipe closes or the parent ends, whichever is seen first."""

    def gone() -> None:
        print("the launcher is gone; so is this shard", file=sys.stderr, flush=True)
        os._exit(0)

    def read() -> None:
        if not os.read(death_fd, 1):
            gone()

    try:
        loop.add_reader(death_fd, read)
    except OSError as error:
        raise ConfigError(f"KVRUN_DEATH_FD is {death_fd}, which is no open pipe: {error}") from error
    with suppress(OSError):  # a parent outside this process namespace, or an old kernel: then the pipe alone tells
        loop.add_reader(os.pidfd_open(os.getppid()), gone)
