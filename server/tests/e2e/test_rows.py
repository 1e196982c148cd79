"""Every row of the table through HTTP: a real router over an engine of this process, prompts of all lengths in one batch.

The launcher and shard processes are left out, which other tests here start: what differs between rows is not theirs.
Models with an encoder answer in test_states.py.
"""

import asyncio
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from grpclib.health.check import ServiceStatus
from kvrun.dist import Group
from kvrun.engine.engine import Engine
from kvrun.engine.memory import MemoryBudget
from kvrun.nn.build import load_model
from kvrun.rpc.compute import ComputeThread
from kvrun.rpc.process import listen
from kvrun.rpc.service import Identity, ModelShard
from tiny import ROWS, TIE, behind, oracle
from tokenizers import Tokenizer
from tree import BIN, PROMPTS, free_port

NEW = 24
ASKED = [*PROMPTS[:3], "A", "Twice " * 12]  # the last is longer than every window and every first range of positions


@contextmanager
def shard(folder: Path, socket: Path) -> Iterator[None]:
    """A shard of this process at a socket."""
    compute, serving, loop = ComputeThread(), ServiceStatus(), asyncio.new_event_loop()
    engine = compute.call(lambda: Engine(load_model(folder, dtype="float32"), Group.single(), MemoryBudget(1 << 24, 1 << 20))).result()
    service = ModelShard(Identity("tiny", 0, 1), compute, broken=lambda: None)
    service.attach(engine)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(socket, service, serving), loop).result()
    loop.call_soon_threadsafe(serving.set, True)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextmanager
def router(folder: Path, prefix: Path) -> Iterator[str]:
    """A router over the shard at `prefix`-0 that is ready; its address."""
    port = free_port()
    flags = [
        "--port",
        str(port),
        "--shard-uds-path",
        str(prefix),
        "--num-shard",
        "1",
        "--tokenizer-name",
        str(folder),
        "--model-id",
        "tiny",
    ]
    process = subprocess.Popen([BIN / "text-generation-router", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not _is_ready(url):
            assert process.poll() is None, process.stdout.read().decode()  # type: ignore[union-attr]
            assert time.monotonic() < deadline, "the router was not ready within a minute"
            time.sleep(0.02)
        yield url
    finally:
        process.kill()
        process.communicate()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].auto != "AutoModelForSeq2SeqLM"])
def test_greedy_answers_over_http_are_transformers_own(row, checkpoint, tmp_path):
    folder = checkpoint(row)
    with shard(folder, tmp_path / "s-0"), router(folder, tmp_path / "s") as url, httpx.Client(base_url=url, timeout=120) as client:

        def ask(prompt: str) -> tuple[list[int], list[int]]:
            parameters = {"max_new_tokens": NEW, "details": True, "decoder_input_details": True}
            reply = client.post("/generate", json={"inputs": prompt, "parameters": parameters})
            assert reply.status_code == 200, reply.text
            details = reply.json()["details"]
            return [t["id"] for t in details["prefill"]], [t["id"] for t in details["tokens"]]

        with ThreadPoolExecutor(len(ASKED)) as pool:
            answers = list(pool.map(ask, ASKED))
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    judged = oracle(folder, [prompt + answer for prompt, answer in answers])
    for (_, answer), logits in zip(answers, judged, strict=True):
        assert len(answer) == NEW or answer[-1] == 2
        assert behind(logits[:, :tokens], answer) < TIE  # ids beyond the tokenizer's are padding and never chosen
