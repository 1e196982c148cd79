"""From a file that lies on the disk alone to the first healthy answer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peers import Model, Peer, Setup
from peers.kvrun import KvRun
from peers.process import Pool

from . import Claim, Figures, Row, Scenario, own

FROM_PRETRAINED = """
import sys, time
began = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM
imported = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
loaded = time.perf_counter()
with torch.inference_mode():
    model(torch.tensor([[1]]))
print(imported - began, loaded - imported, time.perf_counter() - loaded)
"""


def forget(folder: Path) -> None:
    """Have the system drop what it holds of the files beneath a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(peer: Peer, setup: Setup, cold: Path) -> Callable[[Pool, int], Figures]:
    """Start a server and end it again."""

    def measure(pool: Pool, turn: int) -> Figures:
        peer.prepare(setup)
        forget(cold)
        server = pool.get(peer, setup)
        figures = {"s, start to ready": server.ready_s, "GB at the peak": server.peak_bytes() / 1e9}
        pool.drop(peer, setup)
        return figures

    return measure


def from_pretrained(model: Model) -> Callable[[Pool, int], Figures]:
    """Load the model with transformers in a process of its own, and compute one token, because a mapped file is not read before."""

    def measure(pool: Pool, turn: int) -> Figures:
        forget(model.folder)
        began = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", FROM_PRETRAINED, str(model.folder)], check=True, capture_output=True, text=True).stdout
        whole, (imported, loaded, first) = time.perf_counter() - began, map(float, said.split())
        return {"s, start to ready": whole, "s, imports": imported, "s, from_pretrained": loaded, "s, first token": first}

    return measure


def read(folder: Path) -> Callable[[Pool, int], Figures]:
    """Read the file that holds the weights, from the disk, into one buffer."""

    def measure(pool: Pool, turn: int) -> Figures:
        forget(folder)
        buffer, began, total = bytearray(16 << 20), time.perf_counter(), 0
        with (folder / "model.safetensors").open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
        took = time.perf_counter() - began
        return {"s, start to ready": took, "GB/s": total / took / 1e9}

    return measure


def second_start(peer: Peer, setup: Setup) -> Callable[[Pool, int], Figures]:
    """Start a server that finds the packed weights that an earlier start left."""
    assert setup.packed is not None
    packed = setup.packed

    def measure(pool: Pool, turn: int) -> Figures:
        if turn == 0:
            shutil.rmtree(packed, ignore_errors=True)
            pool.get(peer, setup)
            pool.drop(peer, setup)
        return start(peer, setup, setup.model.folder)(pool, turn)

    return measure


def rows(model: Model, peers: Sequence[Peer]) -> list[Row]:
    """Rows of every server but vLLM, which compiles at its first start, of transformers, and of the bare file."""
    setup = Setup(model, streams=4)
    found = [Row(peer, setup, "cold", start(peer, setup, model.folder)) for peer in peers if peer.name != "vLLM"]
    for ours in own(peers):
        found.append(Row(ours, setup, "from_pretrained", from_pretrained(model), label="transformers"))
        found.append(Row(ours, setup, "read", read(model.folder), label="the file alone"))
        if isinstance(ours, KvRun) and "--packed-cache" in ours.flags():
            cached = Setup(model, streams=4, packed=model.folder / "packed")
            found.append(Row(ours, cached, "second start", second_start(ours, cached), label="kv.run bf16, packed cache"))
    return found


ALL = [
    Scenario(
        "loading",
        "From the start of the process to the first healthy answer, bfloat16, no file in memory; with transformers, to its first token.",
        rows,
        (
            Claim("s, start to ready", 0.5, "cold", "from_pretrained", less=True),
            Claim("s, start to ready", 1.3, "second start", "read", less=True),
        ),
    )
]
