"""Reading a prompt: the time to its first token."""

from __future__ import annotations

from collections.abc import Sequence

from load import body, prompt, together
from peers import Model, Peer, Setup
from peers.process import Running

from . import Claim, Figures, Row, Scenario, Share, client, served

TOKENS = 1024


def ask(server: Running, turn: int) -> Figures:
    load = together(server.url, [body(prompt(TOKENS, "prefill", turn), 1, **server.peer.naming(server.setup, None))])
    first = load.first_token_s()
    return {"prompt tokens/s": TOKENS / first, "first token, s": first} | client(load)


def rows(model: Model, peers: Sequence[Peer]) -> list[Row]:
    return [served(p, Setup(model), f"{TOKENS} tokens", ask, token_flops=2.0 * model.linear_parameters) for p in peers]


ALL = [
    Scenario(
        "prefill",
        f"A fresh prompt of {TOKENS:,} tokens and one token of answer, bfloat16. The share counts the layers' linears alone.",
        rows,
        (Claim("prompt tokens/s", 1.5, f"{TOKENS} tokens"), Share("share of the best matmul", 0.75)),
    )
]
