"""Talk to a running kv.run server: generate, stream, many adapters at once, chat.

    python examples/local_api.py --url http://127.0.0.1:3000

The standard library is enough, so the client in the first half can be copied into any program.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor


class ServerError(Exception):
    """The server refused or broke off a request; the message is the server's own."""


class Server:
    """A kv.run server at a URL; every call is one HTTP request and may run in any thread."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 120) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def info(self) -> dict:
        """What is served and within which limits."""
        return json.load(self._open("/info"))

    def adapters(self) -> list[dict]:
        """The adapters that the server knows, each with its name and state."""
        return json.load(self._open("/v1/adapters"))["data"]

    def generate(self, prompt: str, adapter: str | None = None, **parameters) -> dict:
        """Answer a prompt in one piece: {"generated_text": ..., "details": {...}}."""
        return json.load(self._open("/generate", _body(prompt, adapter, parameters)))

    def stream(self, prompt: str, adapter: str | None = None, **parameters) -> Iterator[dict]:
        """Answer a prompt token by token; the last event carries `details`. Closing the iterator cancels the request."""
        with self._open("/generate_stream", _body(prompt, adapter, parameters)) as answer:
            for event in sse(answer):
                if "error" in event:
                    raise ServerError(_reason(event))
                yield event

    def chat(self, messages: list[dict], adapter: str | None = None, **parameters) -> str:
        """Answer a conversation in the OpenAI shape; an adapter is chosen as the model."""
        body = {"model": adapter or "tgi", "messages": messages, **parameters}
        return json.load(self._open("/v1/chat/completions", body))["choices"][0]["message"]["content"]

    def stream_chat(self, messages: list[dict], adapter: str | None = None, **parameters) -> Iterator[str]:
        """The same, piece by piece. Closing the iterator cancels the request."""
        body = {"model": adapter or "tgi", "messages": messages, "stream": True, **parameters}
        with self._open("/v1/chat/completions", body) as answer:
            for event in sse(answer):
                if "error" in event:
                    raise ServerError(_reason(event))
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]

    def _open(self, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            return urllib.request.urlopen(request, timeout=self.timeout_s)
        except urllib.error.HTTPError as refused:
            text = refused.read().decode(errors="replace")
            raise ServerError(f"{refused.code} on {path}: {_reason(text)}") from None
        except urllib.error.URLError as unreachable:
            raise ServerError(f"no server at {self.url} ({unreachable.reason}); start one with `make run`") from None


def sse(lines) -> Iterator[dict]:
    """The JSON events of a server-sent stream of byte lines; comments are skipped, `[DONE]` ends it."""
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)


def _body(prompt: str, adapter: str | None, parameters: dict) -> dict:
    if adapter:
        parameters = {**parameters, "adapter_id": adapter}
    return {"inputs": prompt, "parameters": parameters}


def _reason(answer: str | dict) -> str:
    """The message of an error body, in TGI's or OpenAI's shape, or the body itself."""
    try:
        error = (json.loads(answer) if isinstance(answer, str) else answer)["error"]
    except (ValueError, KeyError, TypeError):
        return str(answer)
    return error["message"] if isinstance(error, dict) else str(error)


# --- the examples ------------------------------------------------------------------------------------------------------


def whole(server: Server, prompt: str) -> None:
    """One answer in one piece, with its details."""
    answer = server.generate(prompt, max_new_tokens=60, details=True)
    details = answer["details"]
    print(f"{prompt}{answer['generated_text']}")
    print(f"({details['generated_tokens']} tokens, ended by {details['finish_reason']})")


def streamed(server: Server, prompt: str) -> None:
    """The same, printed as it comes, sampled with a seed."""
    started, tokens, first = time.perf_counter(), 0, 0.0
    print(prompt, end="")
    for event in server.stream(prompt, max_new_tokens=80, do_sample=True, temperature=0.8, seed=7):
        tokens += 1
        first = first or time.perf_counter() - started
        if not event["token"]["special"]:
            print(event["token"]["text"], end="", flush=True)
    spent = time.perf_counter() - started
    print(f"\n(first token after {first * 1000:.0f} ms, {tokens / spent:.0f} tokens/s)")


def side_by_side(server: Server, prompt: str, names: list[str | None]) -> None:
    """The base and every adapter answer the same prompt at the same time, in one running batch on the server."""
    started = time.perf_counter()
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        answers = pool.map(lambda name: server.generate(prompt, name, max_new_tokens=256, details=True), names)
        tokens = 0
        for name, answer in zip(names, answers):
            tokens += answer["details"]["generated_tokens"]
            print(f"--- {name or 'base'}\n{answer['generated_text'].strip()}")
    print(f"({len(names)} answers, {tokens} tokens in {time.perf_counter() - started:.2f} s)")


def conversation(server: Server, names: list[str | None]) -> None:
    """A chat of two turns with the base, and the first turn with an adapter."""
    messages = [{"role": "user", "content": "Tell me a story about a shy fox named Pip who lost his red kite."}]
    first = server.chat(messages, max_tokens=256, temperature=0)
    print(f"user: {messages[0]['content']}\nbase: {first}\n")
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Where did Pip live?"}]
    print(f"user: {messages[-1]['content']}\nbase: {server.chat(messages, max_tokens=64, temperature=0)}\n")
    if len(names) > 1:
        print(f"user: {messages[0]['content']}\n{names[-1]}: {server.chat(messages[:1], names[-1], max_tokens=256, temperature=0)}")


def main() -> int:
    """Run every example against a server; 1 if it cannot be reached or refuses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--prompt", default="Tell me a story about a young dragon who was afraid of the dark.")
    args = parser.parse_args()
    server = Server(args.url, os.environ.get("API_KEY"))
    try:
        names: list[str | None] = [None, *(adapter["name"] for adapter in server.adapters())]
        print("== /generate")
        whole(server, "Once upon a time, there was")
        print("\n== /generate_stream")
        streamed(server, "Once upon a time, there was")
        print(f"\n== {len(names)} at once: {args.prompt}")
        side_by_side(server, args.prompt, names)
        print("\n== /v1/chat/completions")
        conversation(server, names)
    except ServerError as error:
        print(f"local_api.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
