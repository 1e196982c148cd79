"""Streams over several adapters at once, beside the base and beside fewer adapters."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

from load import body, prompt, together
from make_model import write_adapter
from peers import Model, Peer, Setup
from peers.process import Running

from . import Claim, Figures, Row, Scenario, client, own, served

PROMPT, ANSWER = 32, 48
MANY, MANY_RANK, RESIDENT, REQUESTS = 1000, 8, 128, 96


def ask(server: Running, streams: int, turn: int, adapters: Sequence[Path | None], requests: int = 0) -> Figures:
    """Figures of streams over these adapters in turn; where there are more requests than streams, each is followed by another."""
    count = requests or streams
    naming = [server.peer.naming(server.setup, adapter) for adapter in adapters]
    asked = [body(prompt(PROMPT, "adapters", turn, i), ANSWER, **naming[i % len(naming)]) for i in range(count)]
    load = together(server.url, asked, streams)
    steady = None if requests else load.steady_tokens_per_s()
    return (
        {"tokens/s, prompts included": load.tokens_per_s()}
        | ({} if steady is None else {"tokens/s": steady})
        | {"ms between tokens": load.gap_ms(0.5), "first token, s": load.first_token_s()}
        | client(load)
    )


def warm(server: Running, adapters: Sequence[Path | None]) -> None:
    """One short answer of each adapter."""
    for adapter in adapters:
        together(server.url, [body(prompt(16, "warm", str(adapter)), 4, **server.peer.naming(server.setup, adapter))])


def settle(server: Running) -> None:
    """Wait until the server rests, at most five minutes: it may be loading adapters after it became healthy."""
    for _ in range(150):
        before = server.cpu_s()
        time.sleep(2)
        if server.cpu_s() - before < 0.1:
            return


def cases(peer: Peer, setup: Setup, streams: int, named: dict[str, Sequence[Path | None]]) -> list[Row]:
    """A row of one server for each choice of adapters."""
    return [
        served(peer, setup, case, lambda s, turn, a=chosen: ask(s, streams, turn, a), lambda s, a=chosen: warm(s, a))
        for case, chosen in named.items()
    ]


def ranks(model: Model, peers: Sequence[Peer]) -> list[Row]:
    adapters = tuple(model.adapters)
    named = {"base": [None], f"{len(adapters)} adapters": adapters}
    return [row for peer in own(peers) for row in cases(peer, Setup(model, adapters=adapters), 8, named)]


def four(model: Model, peers: Sequence[Peer]) -> list[Row]:
    adapters = tuple(model.adapters[:4])
    return [row for peer in peers for row in cases(peer, Setup(model, adapters=adapters), 8, {"base": [None], "4 adapters": adapters})]


def many_adapters(model: Model) -> tuple[Path, ...]:
    """A thousand adapters beside the model, written once: 13 GB for the larger shape."""
    folders = tuple(model.folder / "many" / f"lora{i}-r{MANY_RANK}" for i in range(MANY))
    for i, folder in enumerate(folders):
        if not (folder / "adapter_config.json").exists():
            write_adapter(folder, model.sizes, MANY_RANK, 10_000 + i)
    return folders


def many(model: Model, peers: Sequence[Peer]) -> list[Row]:
    """Rows of thirty-two streams over a thousand adapters, the i-th of them 1/i as popular as the first, and over four."""
    adapters = many_adapters(model)
    setup = Setup(model, adapters=adapters, resident=RESIDENT)

    def chosen(turn: int) -> list[Path]:
        return random.Random(turn).choices(adapters, [1 / (i + 1) for i in range(MANY)], k=REQUESTS)

    rows = {"4 adapters": lambda turn: adapters[:4], f"{MANY:,} adapters": chosen}
    return [
        served(
            peer, setup, case, lambda s, turn, c=choose: ask(s, 32, turn, c(turn), REQUESTS), lambda s: (settle(s), warm(s, adapters[:4]))
        )
        for peer in own(peers)
        for case, choose in rows.items()
    ]


ALL = [
    Scenario(
        "ranks",
        "Eight streams, each of its own adapter on all linears, of ranks 8 to 64, beside eight streams of the base on the same server.",
        ranks,
        (Claim("tokens/s, prompts included", 0.90, "8 adapters", "base"), Claim("tokens/s", 0.90, "8 adapters", "base")),
    ),
    Scenario(
        "adapters",
        "Eight streams over four adapters of ranks 8 to 32, and eight of the base of the same servers.",
        four,
        (Claim("tokens/s, prompts included", 3, "4 adapters"), Claim("tokens/s", 0.90, "4 adapters", "base")),
    ),
    Scenario(
        "many",
        f"{REQUESTS} requests, 32 at a time, over {MANY:,} registered adapters of rank {MANY_RANK} with memory for {RESIDENT}, "
        "the popularity of the i-th 1/i of the first one's; beside the same over four of them.",
        many,
        (Claim("tokens/s, prompts included", 0.90, f"{MANY:,} adapters", "4 adapters"),),
        usual=False,
    ),
]
