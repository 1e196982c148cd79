"""The router's own time between the steps of a busy server."""

from __future__ import annotations

import urllib.request
from collections.abc import Sequence

from load import body, prompt, together
from peers import Model, Peer, Setup
from peers.process import Running
from router_gap import grown, histograms, quantile

from . import Figures, Row, Scenario, client, own, served

STREAMS, ANSWER = 32, 48
GAP = "kvrun_router_gap_seconds"


def ask(server: Running, turn: int) -> Figures:
    """Upper bounds of the histogram buckets that hold the quantiles."""

    def read() -> dict[str, dict[float, float]]:
        with urllib.request.urlopen(server.url + "/metrics", timeout=30) as reply:
            return histograms(reply.read().decode())

    before = read()
    load = together(server.url, [body(prompt(32, "router", turn, i), ANSWER) for i in range(STREAMS)])
    counts = grown(before, read())[GAP]
    return {
        "router's gap, at most ms p50": 1e3 * quantile(counts, 0.5),
        "at most ms p99": 1e3 * quantile(counts, 0.99),
        "ms between tokens": load.gap_ms(0.5),
    } | client(load)


def rows(model: Model, peers: Sequence[Peer]) -> list[Row]:
    return [served(peer, Setup(model), f"{STREAMS} streams", ask) for peer in own(peers)]


ALL = [Scenario("router", "Between a step's outcome and the next step, from the histogram of `/metrics`.", rows)]
