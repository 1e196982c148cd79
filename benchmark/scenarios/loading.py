"""From a file to weights that can be multiplied with, and from the start of a server to its first healthy answer."""

from __future__ import annotations

import json
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

LOAD_WEIGHTS = Path(__file__).resolve().parents[1] / "load_weights.py"
PACKED = "packed"  # the folder of packed weights, in the model's own
COLD, MEMORY = "cold", "in memory"

Measure = Callable[[Pool, int], Figures]


def forget(folder: Path) -> None:
    """Have the system drop what it holds of the files beneath a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> Figures:
    """Read a file into one buffer."""
    buffer, began, total = bytearray(16 << 20), time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    took = time.perf_counter() - began
    return {"s, loaded": took, "GB/s": total / took / 1e9}


def load(model: Model, *asked: str) -> Figures:
    """Load the model in a process of its own."""
    said = subprocess.run([sys.executable, LOAD_WEIGHTS, model.folder, *asked], check=True, capture_output=True, text=True).stdout
    found = json.loads(said)
    figures = {"s, loaded": found["loaded"], "processor time, s": found["processor"]}
    figures |= {"s, first token": found["first_token"]} if "first_token" in found else {}
    return figures | {"GB more at the peak": found["peak"] / 1e9, "GB of weights": found["weights"] / 1e9}


def prepared(model: Model, case: str, found: Path, measure: Callable[[], Figures]) -> Measure:
    """A measurement that finds the model's files where the case says: on the disk alone, or in memory too."""

    def once(pool: Pool, turn: int) -> Figures:
        forget(model.folder)
        if case == MEMORY:
            read(found)
        return measure()

    return once


def packed_file(model: Model, threads: int) -> Path:
    """The file of packed weights that a first start leaves, written if there is none."""
    folder = model.folder / PACKED
    shutil.rmtree(folder, ignore_errors=True)
    load(model, "--packed-cache", str(folder), "--threads", str(threads))
    (file,) = folder.iterdir()
    return file


def weights(model: Model, peers: Sequence[Peer]) -> list[Row]:
    """Rows of kv.run and of transformers, of the packed weights of an earlier start, and of the bare files."""
    return [row for peer in peers if isinstance(peer, KvRun) for case in (COLD, MEMORY) for row in _weights(model, peer, case)]


def _weights(model: Model, peer: KvRun, case: str) -> list[Row]:
    setup, plain, threads = Setup(model), model.folder / "model.safetensors", ("--threads", str(peer.threads))
    found: list[Path] = []

    def row(label: str, name: str, file: Callable[[], Path], measure: Callable[[], Figures]) -> Row:
        return Row(peer, setup, f"{name}, {case}", lambda pool, turn: prepared(model, case, file(), measure)(pool, turn), label=label)

    def packed() -> Path:
        # Written once, before anything is timed, by the program as it is now.
        found.extend([packed_file(model, peer.threads)] if not found else [])
        return found[0]

    def made(method: str) -> Row:
        return row(f"kv.run {method}", f"load {method}", lambda: plain, lambda: load(model, "--quantize", method, *threads))

    return [
        row("kv.run bf16", "load", lambda: plain, lambda: load(model, *threads)),
        *(made(method) for method in ("int8", "int4")),
        row("transformers bf16", "from_pretrained", lambda: plain, lambda: load(model, "--transformers", *threads)),
        row("the file", "read", lambda: plain, lambda: read(plain)),
        row(
            "kv.run bf16, packed cache", "load packed", packed, lambda: load(model, "--packed-cache", str(model.folder / PACKED), *threads)
        ),
        row("the packed file", "read packed", packed, lambda: read(packed())),
    ]


def start(peer: Peer, setup: Setup) -> Measure:
    """Start a server and end it again, the model's files on the disk alone; those of packed weights are written before."""

    def measure(pool: Pool, turn: int) -> Figures:
        peer.prepare(setup)
        if setup.packed and turn == 0:
            shutil.rmtree(setup.packed, ignore_errors=True)
            pool.get(peer, setup)
            pool.drop(peer, setup)
        forget(setup.model.folder)
        server = pool.get(peer, setup)
        figures = {"s, start to ready": server.ready_s, "GB at the peak": server.peak_bytes() / 1e9}
        pool.drop(peer, setup)
        return figures

    return measure


def starts(model: Model, peers: Sequence[Peer]) -> list[Row]:
    """Rows of every server but vLLM, which compiles at its first start, and of kv.run's second start."""
    setup, cached = Setup(model, streams=4), Setup(model, streams=4, packed=model.folder / PACKED)
    found = [Row(peer, setup, COLD, start(peer, setup)) for peer in peers if peer.name != "vLLM"]
    return [*found, *(Row(ours, cached, "second start", start(ours, cached), label="kv.run bf16, packed cache") for ours in own(peers))]


def less(ratio: float, case: str, beside: str) -> list[Claim]:
    return [Claim("s, loaded", ratio, f"{case}, {state}", f"{beside}, {state}", less=True) for state in (COLD, MEMORY)]


ALL = [
    Scenario(
        "loading",
        "The weights in a process of its own, after its imports; files on the disk alone, or in the system's memory too. transformers maps "
        "its file, so the rest of its load is in its first token.",
        weights,
        (
            *less(0.5, "load", "from_pretrained"),
            *less(1.3, "load packed", "read packed"),
            *(
                Claim("GB more at the peak", 1.15, f"{case}, {MEMORY}", against="GB of weights", less=True)
                for case in ("load", "load int8", "load int4")
            ),
        ),
    ),
    Scenario(
        "start",
        "From the start of a server's processes to the first healthy answer, bfloat16, no file in memory.",
        starts,
    ),
]
