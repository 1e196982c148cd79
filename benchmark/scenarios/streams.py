"""Decoding: one stream beside the machine's read rate, and many at once."""

from __future__ import annotations

from collections.abc import Sequence

from load import body, prompt, together
from peers import Model, Peer, Setup
from peers.process import Running

from . import Claim, Figures, Row, Scenario, Share, client, own, served

PROMPT, ANSWER = 32, 48


def ask(server: Running, streams: int, turn: int, prompt_tokens: int = PROMPT, tokens: int = ANSWER) -> Figures:
    """Figures of so many streams of the base at once."""
    naming = server.peer.naming(server.setup, None)
    load = together(server.url, [body(prompt(prompt_tokens, "streams", streams, turn, i), tokens, **naming) for i in range(streams)])
    steady = load.steady_tokens_per_s()
    whole = {"tokens/s, prompts included": load.tokens_per_s()} if streams > 1 else {}
    return (
        whole
        | ({} if steady is None else {"tokens/s": steady})
        | {"ms between tokens": load.gap_ms(0.5), "p99": load.gap_ms(0.99), "first token, s": load.first_token_s()}
        | client(load)
    )


def decode(weights: str):
    """Rows of one stream on every peer that has weights of so many bits."""

    def rows(model: Model, peers: Sequence[Peer]) -> list[Row]:
        setup = Setup(model, weights)
        able = [peer for peer in peers if peer.name != "vLLM" or weights == "bf16"]
        return [served(peer, setup, "1 stream", lambda s, t: ask(s, 1, t), step_bytes=lambda p=peer: p.step_bytes(setup)) for peer in able]

    return rows


def throughput(streams: int):
    """Rows of many streams on every peer, bfloat16."""

    def rows(model: Model, peers: Sequence[Peer]) -> list[Row]:
        return [served(peer, Setup(model), f"{streams} streams", lambda s, turn: ask(s, streams, turn)) for peer in peers]

    return rows


def batched(model: Model, peers: Sequence[Peer]) -> list[Row]:
    """Rows of one and of eight streams of kv.run's int4."""
    named = {"1 stream": 1, "8 streams": 8}
    setup = Setup(model, "int4")
    return [served(peer, setup, case, lambda s, turn, n=n: ask(s, n, turn)) for peer in own(peers) for case, n in named.items()]


ALL = [
    Scenario(
        "decode",
        f"One stream of {ANSWER} tokens after a prompt of {PROMPT}, bfloat16.",
        decode("bf16"),
        (Claim("tokens/s", 1.4, "1 stream"), Share("share of the read rate", 0.85)),
    ),
    Scenario(
        "decode-int8",
        "The same, weights of 8 bits: kv.run's int8, llama.cpp's Q8_0.",
        decode("int8"),
        (Claim("tokens/s", 1.8, "1 stream"), Share("share of the read rate", 0.85)),
    ),
    Scenario(
        "decode-int4",
        "The same, weights of 4 bits in groups of 32: kv.run's int4, llama.cpp's Q4_0, whose head has 6 bits where kv.run's has 8.",
        decode("int4"),
        (Claim("tokens/s", 2.0, "1 stream"), Share("share of the read rate", 0.80)),
    ),
    Scenario("batch-int4", "Eight streams of int4 beside one.", batched, (Claim("tokens/s", 4, "8 streams", "1 stream"),)),
    Scenario(
        "streams-8",
        f"Eight streams at once, prompts of {PROMPT} and answers of {ANSWER} tokens, bfloat16. `tokens/s` is while all of them decode.",
        throughput(8),
        (Claim("tokens/s, prompts included", 2, "8 streams"), Claim("tokens/s", 2, "8 streams")),
    ),
    Scenario(
        "streams-32",
        f"Thirty-two streams at once, prompts of {PROMPT} and answers of {ANSWER} tokens, bfloat16.",
        throughput(32),
        (Claim("tokens/s, prompts included", 2, "32 streams"),),
    ),
]
