"""The neutral client: streams of one dialect that all servers speak, `/v1/completions`, and what their tokens' times say.

A thread waits on each socket and stamps what comes; reading the events waits until all streams have ended, so that the client
takes next to nothing of the cores that the server needs.
"""

import http.client
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

TIMEOUT_S = 900
FIRST_WORD = 300
"""Below it lie special, byte and letter tokens of the models that make_model.py writes."""


@dataclass
class Answer:
    """One answer. Times in seconds of `time.perf_counter`."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    """When each event with text came."""
    tokens: int = 0
    """Of the answer, as the server counts them; the events where it was left early."""

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0] - self.sent

    def gaps(self, after: float = 0.0, before: float = float("inf")) -> list[float]:
        """Seconds between tokens, of those that came in a span of time."""
        return [b - a for a, b in itertools.pairwise(self.arrivals) if after <= a and b <= before]


@dataclass
class Load:
    """What several streams at once were answered, and what asking cost."""

    answers: list[Answer]
    client_cpu_s: float
    wall_s: float

    def tokens_per_s(self) -> float:
        """Of all answers, from the first request to the last token, prompts included."""
        span = max(a.arrivals[-1] for a in self.answers) - min(a.sent for a in self.answers)
        return sum(a.tokens for a in self.answers) / span

    def steady_tokens_per_s(self) -> float | None:
        """The sum of the streams' rates while all of them ran: from the latest first token to the earliest last one.

        Nothing where that is too short for two tokens of each.
        """
        start, end = max(a.arrivals[0] for a in self.answers), min(a.arrivals[-1] for a in self.answers)
        total = 0.0
        for answer in self.answers:
            within = [t for t in answer.arrivals if start <= t <= end]
            if len(within) < 2:
                return None
            total += (len(within) - 1) / (within[-1] - within[0]) * answer.tokens / len(answer.arrivals)
        return total

    def first_token_s(self) -> float:
        return statistics.median(a.first_token_s for a in self.answers)

    def gap_ms(self, share: float) -> float:
        """The time between tokens that this share of all gaps does not exceed."""
        return 1e3 * quantile([gap for a in self.answers for gap in a.gaps()], share)


def quantile(values: Iterable[float], share: float) -> float:
    """By nearest rank; not a number where there are no values."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else float("nan")


def prompt(tokens: int, *seed: object) -> list[int]:
    """Random ids after the start token, other ones for every seed, so that no cache of prefixes gains from them."""
    rng = random.Random(repr(seed))
    return [1, *(rng.randrange(FIRST_WORD, 14_000) for _ in range(tokens - 1))]


def body(ids: Sequence[int], tokens: int, **more: object) -> dict:
    """A request for exactly so many likeliest tokens after a prompt of these ids, as a stream."""
    asked = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {"stream_options": {"include_usage": True}} | asked | more


def ask(url: str, request: dict, leave: threading.Event | None = None, on_first: Callable[[], None] | None = None) -> Answer:
    """Send one request and read its stream to the end, or until `leave` is set; raises `RuntimeError` with a refusal's words."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=TIMEOUT_S)
    stamped: list[tuple[float, bytes]] = []
    answer = Answer(time.perf_counter())
    try:
        connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"{url} answered {reply.status}: {reply.read(500).decode(errors='replace')}")
        while chunk := reply.read1(1 << 16):
            stamped.append((time.perf_counter(), chunk))
            if len(stamped) == 2 and on_first:
                on_first()
            if leave and leave.is_set():
                break
    finally:
        connection.close()
    read_events(answer, stamped, request["max_tokens"] if leave is None else None)
    return answer


def read_events(answer: Answer, stamped: list[tuple[float, bytes]], wanted: int | None) -> None:
    """Fill an answer from the bytes of its stream; raises `RuntimeError` at an error in it or a count that was not asked for."""
    rest, counted = b"", None
    for at, chunk in stamped:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(f"the stream broke: {event['error']}")
            if any(choice.get("text") for choice in event.get("choices") or []):
                answer.arrivals.append(at)
            if usage := event.get("usage"):
                counted = usage["completion_tokens"]
    answer.tokens = len(answer.arrivals) if counted is None else counted
    if not answer.arrivals or wanted not in (None, answer.tokens):
        raise RuntimeError(f"asked for {wanted} tokens, got {answer.tokens} in {len(answer.arrivals)} events")


def together(url: str, requests: list[dict], at_once: int = 0) -> Load:
    """Send all requests, so many at a time or all at once, and wait for all answers."""
    cpu, wall = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(at_once or len(requests)) as pool:
        asked: list[Future[Answer]] = [pool.submit(ask, url, request) for request in requests]
        answers = [future.result() for future in asked]
    return Load(answers, time.process_time() - cpu, time.perf_counter() - wall)
