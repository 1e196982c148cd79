"""A running server as a tree of processes: started, asked whether it is ready, held still while others are measured, ended."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import Peer, Setup

READY_S = 600
TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def tree(pid: int) -> list[int]:
    """A process and all below it, parents before their children."""
    found = [pid]
    for parent in found:
        for listed in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in listed.read_text().split()]
            except OSError:  # it ended meanwhile
                continue
    return found


class Running:
    """One started server. `ready_s` is the time from its start to its first healthy answer."""

    def __init__(self, peer: Peer, setup: Setup, log: Path):
        self.peer, self.setup, self.log = peer, setup, log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        unset = ("API_KEY", "PORT", "MODEL_ID", "OMP_NUM_THREADS")
        env = {k: v for k, v in os.environ.items() if k not in unset} | {"HF_HUB_OFFLINE": "1"} | peer.environment(setup)
        self.began = time.perf_counter()
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                peer.command(setup, port), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        try:
            self.ready_s = self._wait()
        except BaseException:  # an interrupted start leaves no process either
            self.stop()
            raise

    def _wait(self) -> float:
        while time.perf_counter() - self.began < READY_S:
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5) as reply:
                    if reply.status == 200:
                        return time.perf_counter() - self.began
            except (OSError, urllib.error.URLError):
                time.sleep(0.02)
        last = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{self.peer.name} did not get ready; the end of {self.log}:\n{last}")

    def _signal(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def freeze(self) -> None:
        """Stop every process, those that watch others first."""
        self._signal(signal.SIGSTOP, tree(self.process.pid))

    def thaw(self) -> None:
        """Let every process go on, those that are watched first."""
        self._signal(signal.SIGCONT, tree(self.process.pid)[::-1])

    def cpu_s(self) -> float:
        """Processor time of all living processes so far."""
        total = 0
        for pid in tree(self.process.pid):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def peak_bytes(self) -> int:
        """The largest resident memory that any one of the processes ever had."""
        peaks = [0]
        for pid in tree(self.process.pid):
            if found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
                peaks.append(int(found[1]) * 1024)
        return max(peaks)

    def kill(self) -> None:
        """End all of it by force."""
        self._signal(signal.SIGKILL, tree(self.process.pid))

    def stop(self) -> None:
        """End all of it, by force after twenty seconds."""
        pids = tree(self.process.pid)
        self.thaw()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._signal(signal.SIGKILL, pids[1:])


class Pool:
    """The servers that are up; all but the one that is measured are held still, so that an idle one takes no processor."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.running: dict[tuple[str, Setup], Running] = {}

    def get(self, peer: Peer, setup: Setup) -> Running:
        """A server for this setup, started if there is none, held still."""
        key = (peer.name, setup)
        if key not in self.running:
            peer.prepare(setup)
            name = re.sub(r"\W+", "-", peer.label(setup))
            self.running[key] = Running(peer, setup, self.logs / f"{name}-{len(setup.adapters)}.log")
            self.running[key].freeze()
        return self.running[key]

    @contextmanager
    def alone(self, server: Running) -> Iterator[Running]:
        """This one runs, all others are held still."""
        server.thaw()
        try:
            yield server
        finally:
            server.freeze()

    def drop(self, peer: Peer, setup: Setup) -> None:
        """End this one."""
        self.running.pop((peer.name, setup)).stop()

    def kill(self) -> None:
        """End all at once, whatever they are doing."""
        for server in self.running.values():
            server.kill()

    def close(self) -> None:
        """End all."""
        self.keep(set())

    def keep(self, wanted: set[tuple[str, Setup]]) -> None:
        """End those that are not wanted any more."""
        for key in [key for key in self.running if key not in wanted]:
            self.running.pop(key).stop()
