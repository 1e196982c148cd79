"""A small HTTP server that answers in kv.run's shapes, for the clients' tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

WORDS = ["Once", " upon", " a", " <b>time</b>", "."]
ADAPTERS = [
    {"name": "pirate", "state": "ready", "rank_min": 8, "rank_max": 8},
    {"name": "news", "state": "known", "rank_min": 4, "rank_max": 16},
    {"name": "broken", "state": "failed", "error": "a tensor has the wrong shape"},
]


class FakeServer(ThreadingHTTPServer):
    """Answers with WORDS; `together` streams must be open at once before any of them goes on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bodies: list[dict] = []
        self.gate: threading.Barrier | None = None
        self.left = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """The routes that the examples use."""

    server: FakeServer

    def log_message(self, *_) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        """The listing routes."""
        routes = {"/v1/adapters": {"data": ADAPTERS}, "/info": {"model_id": "demo"}}
        found = self.path in routes
        self.reply(routes.get(self.path, {"error": "no such route"}), 200 if found else 404)

    def do_POST(self) -> None:
        """The generating routes."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        adapter = body.get("parameters", {}).get("adapter_id") or body.get("model", "tgi")
        if adapter == "nobody":
            self.reply({"error": "unknown adapter nobody", "error_type": "unknown_adapter"}, 404)
        elif self.path == "/generate":
            details = {"finish_reason": "length", "generated_tokens": len(WORDS), "adapter": {"name": adapter}}
            self.reply({"generated_text": "".join(WORDS), "details": details})
        elif self.path == "/generate_stream":
            self.stream(tgi_events(adapter), endless=adapter == "endless")
        elif body.get("stream"):
            self.stream(chat_events())
        else:
            self.reply({"choices": [{"message": {"role": "assistant", "content": f"{adapter}: {body['messages'][-1]['content']}"}}]})

    def reply(self, body: dict, status: int = 200) -> None:
        """One JSON body."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, events: list[str], endless: bool = False) -> None:
        """Server-sent events with a comment between, as a proxy's keep-alive would be."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if self.server.gate:
            self.server.gate.wait(timeout=20)
        try:
            while True:
                for event in events:
                    self.wfile.write(f":keep-alive\n\ndata:{event}\n\n".encode())
                    self.wfile.flush()
                if not endless:
                    return
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()


def tgi_events(adapter: str) -> list[str]:
    """The events of /generate_stream; the adapter "breaks" fails after two tokens."""
    events = [
        {"index": i + 1, "token": {"id": i, "text": word, "logprob": -0.1, "special": False}, "generated_text": None, "details": None}
        for i, word in enumerate(WORDS)
    ]
    if adapter == "breaks":
        return [json.dumps(event) for event in [*events[:2], {"error": "the shard is gone", "error_type": "generation"}]]
    end = {"id": 9, "text": "</s>", "logprob": 0.0, "special": True}
    details = {"finish_reason": "eos_token", "generated_tokens": len(WORDS) + 1, "seed": None, "input_length": 3}
    if adapter != "endless":
        events.append({"index": 6, "token": end, "generated_text": "".join(WORDS), "details": details})
    return [json.dumps(event) for event in events]


def chat_events() -> list[str]:
    """The events of a streamed chat completion."""
    deltas: list[dict] = [{"role": "assistant", "content": ""}, *({"content": word} for word in WORDS)]
    chunks = [{"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return [*(json.dumps(chunk) for chunk in chunks), "[DONE]"]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """A running fake server, closed after the test."""
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
