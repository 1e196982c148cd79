"""What is measured: each scenario is rows of a table and what is claimed of them, in a file by its subject.

A row is measured once in every turn, all rows of a scenario taking turns, so that what the machine does meanwhile meets all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from load import Load, body, prompt, together
from peers import Model, Peer, Setup
from peers.process import Pool, Running

Figures = dict[str, float]
"""Name with unit -> number. What the client took is `client`, in cores."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a server, and what is done to it."""

    peer: Peer
    setup: Setup
    case: str
    measure: Callable[[Pool, int], Figures]
    step_bytes: Callable[[], int] | None = None
    """Bytes that a step must read; `ms between tokens` is then told as a share of the read rate too."""
    token_flops: float | None = None
    """Operations of the layers' linears for a token; `prompt tokens/s` is then told as a share of the best matmul too."""
    label: str = ""

    @property
    def server(self) -> str:
        return self.label or self.peer.label(self.setup)


@dataclass(frozen=True)
class Claim:
    """What a row of kv.run is to reach beside another: `ratio` times (or at most, where `less`) the figure of the row it is put beside."""

    figure: str
    ratio: float
    case: str
    beside: str = ""
    """The other case of kv.run; the best peer's same case where it is left out."""
    against: str = ""
    """Another figure of the same row, in place of another row."""
    less: bool = False


@dataclass(frozen=True)
class Share:
    """What share of the machine's limit the rows of kv.run are to reach."""

    figure: str
    least: float


@dataclass(frozen=True)
class Scenario:
    """`title` is what a reader of the table must know of how it was measured."""

    name: str
    title: str
    rows: Callable[[Model, Sequence[Peer]], list[Row]]
    claims: tuple[Claim | Share, ...] = ()
    usual: bool = True
    """Whether it is part of `make bench`."""
    turns: int | None = None
    """How often every row is measured, where that is not left to the command line."""


def served(
    peer: Peer, setup: Setup, case: str, ask: Callable[[Running, int], Figures], warm: Callable[[Running], object] | None = None, **facts
) -> Row:
    """A row whose server is up before it is measured; `warm` is done to it once before the first turn."""

    def measure(pool: Pool, turn: int) -> Figures:
        server = pool.get(peer, setup)
        with pool.alone(server):
            if turn == 0:
                (warm or short)(server)
            return ask(server, turn)

    return Row(peer, setup, case, measure, **facts)


def own(peers: Sequence[Peer]) -> list[Peer]:
    """kv.run alone, for what is measured of it only; nobody where it was left out."""
    return [peer for peer in peers if peer.name == "kv.run"]


def short(server: Running) -> None:
    """A first request, so that no turn pays for what a server does once."""
    naming = server.peer.naming(server.setup, None)
    together(server.url, [body(prompt(16, "short", i), 4, **naming) for i in range(2)])


def client(load: Load) -> Figures:
    return {"client": load.client_cpu_s / load.wall_s}


def every() -> list[Scenario]:
    """All scenarios in the order of the page."""
    from . import adapters, arrival, context, idle, loading, prefill, router, streams

    return [*streams.ALL, *prefill.ALL, *adapters.ALL, *context.ALL, *arrival.ALL, *loading.ALL, *idle.ALL, *router.ALL]
