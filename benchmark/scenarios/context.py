"""Decoding at the end of a long context."""

from __future__ import annotations

from collections.abc import Sequence

from load import body, prompt, together
from peers import Model, Peer, Setup
from peers.process import Running

from . import Claim, Figures, Row, Scenario, client, served

CONTEXT, ANSWER = 16_384, 33


def ask(server: Running, turn: int) -> Figures:
    """Of the same prompt in every turn: it is read once, and then found in the cache of prefixes."""
    fields = server.peer.naming(server.setup, None) | server.peer.reusing()
    load = together(server.url, [body(prompt(CONTEXT, "context"), ANSWER, **fields)])
    return {"tokens/s": load.steady_tokens_per_s() or float("nan"), "ms between tokens": load.gap_ms(0.5)} | client(load)


def rows(model: Model, peers: Sequence[Peer]) -> list[Row]:
    """Rows of the servers that can be told by a request to reuse what they read before, which vLLM is started without."""
    setup = Setup(model, streams=1, context=CONTEXT + 64)

    def bytes_of(peer: Peer) -> int:
        return peer.step_bytes(setup) + CONTEXT * model.kv_bytes

    case, able = f"{CONTEXT:,} tokens", [peer for peer in peers if peer.name != "vLLM"]
    return [served(peer, setup, case, ask, lambda s: ask(s, 0), step_bytes=lambda p=peer: bytes_of(p)) for peer in able]


ALL = [
    Scenario(
        "context",
        f"One stream after {CONTEXT:,} tokens, bfloat16 weights, keys and values of 16 bits; they are read once, and counted in the share.",
        rows,
        (Claim("tokens/s", 1.3, f"{CONTEXT:,} tokens"),),
        usual=False,
    )
]
