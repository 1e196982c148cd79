#!/usr/bin/env python3
"""Where the time between tokens goes in a running server: opens streams, and reads the histograms of `/metrics` around them.

    text-generation-launcher --model-id /tmp/1b & router_gap.py http://127.0.0.1:3000 --streams 32 --adapters a,b

Starts nothing. Prints p50 and p99 of every histogram of time that grew meanwhile, in milliseconds, as the bound of the bucket
that holds the quantile: "at most". `kvrun_router_gap_seconds` is the router's own time between an outcome and the next step while
the shards have none, `kvrun_router_hidden_seconds` the same while they compute one that was sent ahead.
"""

import argparse
import http.client
import itertools
import json
import os
import re
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

WORDS = ("kine", "bado", "lemi", "sotu", "ravi", "tolo", "peni", "guma")
BUCKET = re.compile(r'^(\w+)_bucket\{(?:(.*),)?le="([^"]+)"\} (\S+)$')


def ask(url: str, method: str, path: str, body: dict | None = None) -> http.client.HTTPResponse:
    """The answer to one request; raises `RuntimeError` with the server's words where its status is not 200."""
    address = urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port or 80, timeout=600)
    connection.request(method, path, json.dumps(body) if body else None, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{path} answered {answer.status}: {answer.read().decode(errors='replace')}")
    return answer


def histograms(page: str) -> dict[str, dict[float, float]]:
    """Cumulative counts by upper bound, of every histogram of a metrics page; its labels are part of its name."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for line in page.splitlines():
        if match := BUCKET.match(line):
            name, labels, bound, count = match.groups()
            found[f"{name}{{{labels}}}" if labels else name][float(bound)] = float(count)
    return dict(found)


def quantile(counts: dict[float, float], share: float) -> float:
    """The upper bound of the bucket in which `share` of the cumulative `counts` is reached."""
    total = max(counts.values())
    return min(bound for bound, count in counts.items() if count >= share * total)


def grown(before: dict[str, dict[float, float]], after: dict[str, dict[float, float]]) -> dict[str, dict[float, float]]:
    """What was counted between two readings, without histograms in which nothing was."""
    changes = {}
    for name, counts in after.items():
        earlier = before.get(name, {})
        changes[name] = {bound: count - earlier.get(bound, 0) for bound, count in counts.items()}
    return {name: counts for name, counts in changes.items() if max(counts.values()) > 0}


def stream(url: str, number: int, tokens: int, adapter: str | None) -> int:
    """Tokens of one greedy stream, read to its end."""
    parameters = {"max_new_tokens": tokens, "ignore_eos_token": True, **({"adapter_id": adapter} if adapter else {})}
    prompt = " ".join(itertools.islice(itertools.cycle(WORDS), number % len(WORDS), number % len(WORDS) + 16))
    read = 0
    for line in ask(url, "POST", "/generate_stream", {"inputs": prompt, "parameters": parameters}):
        if line.startswith(b"data:"):
            if "error" in json.loads(line[5:]):
                raise RuntimeError(line.decode(errors="replace"))
            read += 1
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server; a key is taken from the environment variable API_KEY")
    parser.add_argument("--streams", type=int, default=32, help="streams open at a time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--adapters", default="", help="names, comma between them; streams take them in turn, beside the base")
    args = parser.parse_args()
    adapters = [None, *filter(None, args.adapters.split(","))]

    def read() -> dict[str, dict[float, float]]:
        return histograms(ask(args.url, "GET", "/metrics").read().decode())

    stream(args.url, 0, 2, None)
    before, began = read(), time.perf_counter()
    with ThreadPoolExecutor(args.streams) as pool:
        jobs = [pool.submit(stream, args.url, n, args.tokens, adapters[n % len(adapters)]) for n in range(args.streams)]
        count = sum(job.result() for job in jobs)
    took = time.perf_counter() - began
    print(f"{args.streams} streams, {count} tokens in {took:.1f} s: {count / took:.0f} tokens/s\n")
    print("| histogram | counted | p50, at most ms | p99, at most ms |\n|---|---|---|---|")
    for name, counts in sorted(grown(before, read()).items()):
        if name.split("{")[0].endswith(("_seconds", "_duration")):
            p50, p99 = (1e3 * quantile(counts, share) for share in (0.5, 0.99))
            print(f"| `{name}` | {max(counts.values()):.0f} | {p50:g} | {p99:g} |")


if __name__ == "__main__":
    main()
