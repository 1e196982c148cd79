"""A whole running tree for tests: launcher, router and shards as a user starts them, and a small client."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[3]
BIN = ROOT / ".venv" / "bin"
DEMO = ROOT / "examples" / "demo"
READY_S = 120


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def demo_adapters() -> dict[str, Path]:
    return {p.name: p for p in sorted((DEMO / "adapters").iterdir()) if (p / "adapter_config.json").exists()}


def descendants(pid: int) -> dict[int, str]:
    """Every living process below `pid`, with its command line."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found, frontier = {}, {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        for child in frontier:
            try:
                found[child] = (Path("/proc") / str(child) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


@dataclass
class Answer:
    """One finished answer: ids, text and how it ended, or the error that ended it."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    error: str | None = None
    terminals: int = 0
    details: dict = field(default_factory=dict)


@dataclass
class Tree:
    """A running launcher with its children, reached at `url`."""

    process: subprocess.Popen
    url: str
    log: list[str]
    ready_s: float = 0.0

    def client(self, **kwargs) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **kwargs)

    def shards(self) -> list[int]:
        """The ids of the shard processes, by rank."""
        found = {}
        for pid, command in descendants(self.process.pid).items():
            if "-m kvrun" in command and (rank := re.search(r"--rank (\d+)", command)):
                found[int(rank[1])] = pid
        return [found[rank] for rank in sorted(found)]

    def generate(self, prompt: str, **parameters) -> Answer:
        """The whole answer of `/generate` with details."""
        with self.client() as http:
            reply = http.post("/generate", json={"inputs": prompt, "parameters": {"details": True, **parameters}})
        if reply.status_code != 200:
            return Answer(error=f"{reply.status_code}: {reply.text}")
        body = reply.json()
        details = body["details"]
        return Answer([t["id"] for t in details["tokens"]], body["generated_text"], details["finish_reason"], terminals=1, details=details)

    def stream(self, prompt: str, stop_after: int | None = None, on_token=None, **parameters) -> Answer:
        """An answer of `/generate_stream`, read to its end, or left after `stop_after` tokens."""
        answer = Answer()
        with (
            self.client() as http,
            http.stream("POST", "/generate_stream", json={"inputs": prompt, "parameters": {"details": True, **parameters}}) as reply,
        ):
            if reply.status_code != 200:
                answer.error = f"{reply.status_code}: {reply.read().decode()}"
                return answer
            for line in reply.iter_lines():
                if not line.startswith("data:"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    answer.error, answer.terminals = event["error"], answer.terminals + 1
                    continue
                answer.ids.append(event["token"]["id"])
                if on_token:
                    on_token(answer)
                if event.get("generated_text") is not None:
                    answer.text, answer.terminals = event["generated_text"], answer.terminals + 1
                    answer.details = event["details"] or {}
                    answer.finish = answer.details.get("finish_reason")
                if stop_after is not None and len(answer.ids) >= stop_after:
                    break
        return answer

    def metrics(self) -> dict[str, float]:
        """Every sample of `/metrics`, by its name with labels."""
        with self.client() as http:
            lines = http.get("/metrics").text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def stop(self, how: int = signal.SIGTERM, timeout: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout)


def launch(*flags: str, env: dict[str, str] | None = None, port: int | None = None) -> Tree:
    """Start a launcher and return at once; `wait_ready` waits."""
    port = port or free_port()
    command = [str(BIN / "text-generation-launcher"), "--port", str(port), *flags]
    clean = {k: v for k, v in os.environ.items() if k not in ("API_KEY", "PORT", "MODEL_ID")} | {"HF_HUB_OFFLINE": "1"} | (env or {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean, cwd=ROOT)
    log: list[str] = []

    def pump() -> None:
        for line in process.stdout:  # type: ignore[union-attr]
            log.append(line.decode(errors="replace").rstrip())

    threading.Thread(target=pump, daemon=True).start()
    return Tree(process, f"http://127.0.0.1:{port}", log)


def wait_ready(tree: Tree, timeout: float = READY_S) -> Tree:
    began = time.monotonic()
    while time.monotonic() - began < timeout:
        if tree.process.poll() is not None:
            raise AssertionError(f"the launcher ended with {tree.process.returncode}:\n" + "\n".join(tree.log[-40:]))
        try:
            if httpx.get(tree.url + "/health", timeout=5).status_code == 200:
                tree.ready_s = time.monotonic() - began
                return tree
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError("not ready in time:\n" + "\n".join(tree.log[-40:]))


@contextmanager
def running(*flags: str, **kwargs) -> Iterator[Tree]:
    tree = launch(*flags, **kwargs)
    try:
        yield wait_ready(tree)
    finally:
        if tree.process.poll() is None:
            tree.process.terminate()
            try:
                tree.process.wait(30)
            except subprocess.TimeoutExpired:
                tree.process.kill()
                tree.process.wait()


def demo_flags(adapters: bool = True, dtype: str = "float32") -> list[str]:
    flags = ["--model-id", str(DEMO / "model"), "--dtype", dtype, "--lora-dir", str(DEMO / "adapters")]
    return flags + (["--lora-ids", ";".join(f"{name}={path}" for name, path in demo_adapters().items())] if adapters else [])


def together(calls: list) -> list:
    """Run every call in its own thread, all at once, and give their results in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result() for f in [pool.submit(call) for call in calls]]


PROMPTS = [
    "Once upon a time", "One day, a little fox", "The old farmer", "In the forest there was", "Lily and Tom",
    "A small bird", "The king", "It was raining when", "There was a boat", "Mia had a red ball",
    "Ben was sad because", "The cat", "Every morning", "At night", "The moon", "A girl named",
    "Deep in the sea", "Grandma said", "The dragon", "After school",
]  # fmt: skip
