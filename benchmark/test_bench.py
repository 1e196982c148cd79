"""The benchmark judged by servers whose times are known."""

import http.server
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from load import Answer, Load, ask, body, prompt, together
from make_model import SHAPES, write_adapter, write_model
from peers import Model, Setup
from peers.kvrun import KvRun
from peers.llama_cpp import LlamaCpp
from peers.process import Pool, Running
from peers.vllm import Vllm
from report import READ_SHARE, Line, Result, claimed, section
from scenarios import Claim, Scenario, Share, every

GAP_S = 0.03


class Stand(http.server.BaseHTTPRequestHandler):
    """Answers each token after the same time; `max_tokens` 13 is answered with a token too few, 99 breaks its stream."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        count = asked["max_tokens"] - (asked["max_tokens"] == 13)
        try:
            for _ in range(count if asked["max_tokens"] != 99 else 2):
                time.sleep(GAP_S)
                self.event({"choices": [{"text": "a"}]})
            if asked["max_tokens"] == 99:
                self.event({"error": {"message": "no memory"}})
            self.event({"choices": [], "usage": {"completion_tokens": count}})
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")
        except OSError:  # the client left
            self.close_connection = True

    def event(self, data: dict) -> None:
        # Cut within the line: a read of the socket need not end where an event does.
        line = b"data: " + json.dumps(data).encode() + b"\n\n"
        self.chunk(line[:9])
        self.chunk(line[9:])

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stand)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_times_and_rates_are_those_of_the_server(url):
    load = together(url, [body(prompt(8, i), 10) for i in range(4)])
    assert [a.tokens for a in load.answers] == [10] * 4 and [len(a.arrivals) for a in load.answers] == [10] * 4
    # A busy machine makes them slower, and nothing makes them faster.
    assert load.gap_ms(0.5) >= GAP_S * 1e3 and load.first_token_s() >= GAP_S
    assert load.tokens_per_s() <= load.steady_tokens_per_s() <= 4 / GAP_S


def test_rates_are_those_of_the_times_at_which_tokens_came():
    early, late = Answer(0.0, [1.0, 1.5, 2.0, 2.5], 4), Answer(0.5, [2.0, 2.5, 3.0, 3.5], 8)
    load = Load([early, late], 0.0, 4.0)
    assert load.first_token_s() == 1.25 and load.gap_ms(0.5) == 500
    assert load.tokens_per_s() == 12 / 3.5
    assert load.steady_tokens_per_s() == 2 + 4, "while both ran, and where an event brings two tokens, both count"


def test_fewer_at_a_time_take_longer(url):
    began = time.perf_counter()
    together(url, [body(prompt(8, i), 4) for i in range(4)], at_once=2)
    assert time.perf_counter() - began >= 8 * GAP_S


@pytest.mark.parametrize("tokens, words", [(13, "asked for 13 tokens, got 12"), (99, "no memory")])
def test_a_short_or_broken_answer_is_no_measurement(url, tokens, words):
    with pytest.raises(RuntimeError, match=words):
        together(url, [body(prompt(8), tokens)])


def test_a_stream_can_be_left(url):
    leave = threading.Event()
    threading.Timer(5 * GAP_S, leave.set).start()
    answer = ask(url, body(prompt(8), 1000), leave)
    assert 2 <= answer.tokens <= 9


def test_prompts_repeat_with_their_seed_only():
    assert prompt(64, "a", 1) == prompt(64, "a", 1) != prompt(64, "a", 2) and len(prompt(64, "a")) == 64
    assert prompt(64, "a", 1)[1:17] != prompt(64, "a", 2)[1:17], "a page of them would be found in a cache of prefixes"


BUSY = "while True: pass"
SERVER = f"""
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", {BUSY!r}])
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


class Spinning:
    """A server whose child never rests."""

    name = "spinning"

    def label(self, setup):
        return f"spinning {setup.weights}"

    def prepare(self, setup):
        pass

    def command(self, setup, port):
        return [sys.executable, "-c", SERVER if setup.weights != "none" else "raise SystemExit('no weights here')", str(port)]

    def environment(self, setup):
        return {}


def running_in(sessions: list[int]) -> list[str]:
    """The processes of these sessions that live, a moment later."""
    assert sessions
    time.sleep(0.2)
    listed = subprocess.run(["ps", "-o", "stat=,cmd=", "-s", ",".join(map(str, sessions))], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if not line.startswith("Z")]


@contextmanager
def spent(server: Running):
    """The processor time of a server meanwhile, in a list."""
    found, before = [], server.cpu_s()
    yield found
    found.append(server.cpu_s() - before)


def test_only_the_server_that_is_measured_runs(tmp_path):
    model, pool = Model(tmp_path), Pool(tmp_path)
    try:
        one, two = (pool.get(Spinning(), Setup(model, weights)) for weights in ("bf16", "int8"))
        with pool.alone(one), spent(one) as ran, spent(two) as held:
            time.sleep(0.5)
        assert ran[0] > 0.1 and held[0] <= 0.02
        pool.keep({("spinning", two.setup)})
        assert one.process.poll() is not None and two.process.poll() is None
        assert pool.get(Spinning(), two.setup) is two
    finally:
        pids = [s.process.pid for s in pool.running.values()]
        pool.close()
    assert not running_in(pids)


def test_servers_held_still_can_be_ended_at_once(tmp_path):
    pool = Pool(tmp_path)
    server = pool.get(Spinning(), Setup(Model(tmp_path)))
    pool.kill()
    assert not running_in([server.process.pid])
    pool.close()


def test_an_interrupted_start_leaves_no_process(tmp_path, monkeypatch):
    pids = []

    def interrupted(server: Running) -> float:
        pids.append(server.process.pid)
        raise SystemExit(143)

    monkeypatch.setattr(Running, "_wait", interrupted)
    with pytest.raises(SystemExit):
        Pool(tmp_path).get(Spinning(), Setup(Model(tmp_path)))
    assert not running_in(pids)


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="no weights here"):
        Pool(tmp_path).get(Spinning(), Setup(Model(tmp_path), "none"))


def result(**rates: list[float]) -> Result:
    """A result of kv.run and peers with these tokens per second, in the limits of a machine that reads 10 GB/s."""
    found = Result("decode", "1b", "a machine", "abc", {"read": [9e9, 10e9, 11e9], "bfloat16": [1e12], "float32": [5e11]})
    for name, values in rates.items():
        line = Line(f"{name} bf16", name.replace("_", "."), "1 stream", bytes=1e9)
        for value in values:
            line.add({"tokens/s": value, "ms between tokens": 1e3 / value, "client": 0.01})
        found.lines.append(line)
    return found


def test_claims_are_judged_by_medians_beside_the_best_peer():
    found = result(kv_run=[9, 6, 1], slow=[3, 3, 3], fast=[4, 100, 2])
    assert claimed(Claim("tokens/s", 1.4, "1 stream"), found) == [
        "kv_run bf16, 1 stream, tokens/s: 1.50 × fast bf16, 1 stream (wanted: at least 1.4)"
    ]
    assert claimed(Claim("tokens/s", 1.4, "8 streams"), found) == []
    assert claimed(Claim("tokens/s", 1.4, "1 stream"), result(kv_run=[1])) == [], "with no peer there is nothing to say"
    found.shares()
    assert claimed(Share(READ_SHARE, 0.85), found) == ["kv_run bf16, share of the read rate: 60% (wanted: 85%)"]


def test_a_page_tells_every_row_and_the_client_s_cost(tmp_path):
    found = result(kv_run=[9, 6, 1], fast=[4])
    found.missing.append("slow bf16, 1 stream: not here")
    found.save(tmp_path)
    text = section(
        Scenario("decode", "One stream.", lambda *_: [], (Claim("tokens/s", 1.4, "1 stream"),)), Result.load(tmp_path / "decode.json")
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 4
    assert "6 (1 to 9)" in rows[2] and "60% (10% to 90%)" in rows[2] and "| 4 |" in rows[3]
    assert "Not measured: slow" in text and "1.0% of a core" in text and "1.50 × fast" in text


def test_what_is_claimed_is_measured(tmp_path):
    write_model(tmp_path, SHAPES["tiny"], 1024, 512, 0)
    for i in range(8):
        write_adapter(tmp_path / "adapters" / f"lora{i}-r{i + 1}", SHAPES["tiny"], i + 1, i)
    peers = [KvRun(tmp_path, 2), LlamaCpp(tmp_path, tmp_path, 2), Vllm(tmp_path, 2)]
    for scenario in every():
        if scenario.name == "many":  # its adapters are written to be listed
            continue
        rows = scenario.rows(Model(tmp_path), peers)
        keys = [(row.server, row.case) for row in rows]
        assert len(set(keys)) == len(keys), f"{scenario.name} has two rows of one name"
        for claim in scenario.claims:
            if isinstance(claim, Claim):
                cases = {row.case for row in rows if row.peer.name == "kv.run"}
                assert {claim.case, claim.beside or claim.case} <= cases, scenario.name
    assert len({scenario.name for scenario in every()}) == len(every())
