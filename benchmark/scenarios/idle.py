"""What a server takes while nobody asks it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from peers import Model, Peer, Setup
from peers.process import Running

from . import Figures, Row, Scenario, served

SECONDS = 60


def ask(server: Running, turn: int) -> Figures:
    time.sleep(2)
    before, began = server.cpu_s(), time.perf_counter()
    time.sleep(SECONDS)
    spent = server.cpu_s() - before
    return {"processor time, s": spent, "% of a core": 100 * spent / (time.perf_counter() - began)}


def rows(model: Model, peers: Sequence[Peer]) -> list[Row]:
    return [served(peer, Setup(model), "idle", ask) for peer in peers]


ALL = [Scenario("idle", f"Processor time of all processes over {SECONDS} s without a request, after one.", rows, turns=1)]
