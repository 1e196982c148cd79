"""What running streams notice of a long prompt that arrives."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from load import ask as ask_one
from load import body, prompt, quantile
from peers import Model, Peer, Setup
from peers.process import Running

from . import Claim, Figures, Row, Scenario, served

STREAMS, ARRIVING, QUIET_S = 8, 4096, 4.0


def ask(server: Running, turn: int) -> Figures:
    """The times between tokens of eight streams before a prompt arrives, and from then to its first token."""
    naming = server.peer.naming(server.setup, None)
    leave, begun = threading.Event(), threading.Semaphore(0)
    cpu, wall = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as pool:
        asked = [body(prompt(32, "runs", turn, i), 2048, **naming) for i in range(STREAMS)]
        running = [pool.submit(ask_one, server.url, one, leave, begun.release) for one in asked]
        try:
            for _ in running:
                begun.acquire(timeout=120)
            quiet = time.perf_counter()
            time.sleep(QUIET_S)
            arrived = ask_one(server.url, body(prompt(ARRIVING, "arrives", turn), 1, **naming))
        finally:
            leave.set()
        answers = [future.result() for future in running]
    spent = (time.process_time() - cpu) / (time.perf_counter() - wall)
    before = [gap for a in answers for gap in a.gaps(quiet, arrived.sent)]
    meanwhile = [gap for a in answers for gap in a.gaps(arrived.sent, arrived.arrivals[0])]
    # A stream that got nothing while the prompt was read has no gap within: what it waited is the gap around.
    meanwhile += [gap for a in answers for gap in around(a.arrivals, arrived.sent, arrived.arrivals[0])]
    return {
        "ms between tokens, before": 1e3 * quantile(before, 0.5),
        "p99 before": 1e3 * quantile(before, 0.99),  # what the machine's own unrest makes of steps that are all alike
        "meanwhile": 1e3 * quantile(meanwhile, 0.5),
        "p99 meanwhile": 1e3 * quantile(meanwhile, 0.99),
        "the prompt's first token, s": arrived.first_token_s,
        "client": spent,
    }


def around(arrivals: list[float], start: float, end: float) -> list[float]:
    """The gaps that contain a span's start or end."""
    return [b - a for a, b in itertools.pairwise(arrivals) if a < start < b or a < end < b]


def rows(model: Model, peers: Sequence[Peer]) -> list[Row]:
    setup = Setup(model, streams=STREAMS + 1, context=ARRIVING + 256)
    return [served(peer, setup, f"{STREAMS} streams", ask) for peer in peers]


ALL = [
    Scenario(
        "arrival",
        f"{STREAMS} streams decode; {QUIET_S:.0f} s after their first tokens a prompt of {ARRIVING:,} tokens arrives. bfloat16.",
        rows,
        (Claim("p99 meanwhile", 2.5, f"{STREAMS} streams", against="ms between tokens, before", less=True),),
        usual=False,
    )
]
