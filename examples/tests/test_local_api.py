"""The small client against the shapes it must understand."""

import sys

import local_api
import pytest
from local_api import Server, ServerError


def test_an_answer_in_one_piece_and_its_adapter(fake):
    answer = Server(fake.url).generate("Hello", "pirate", max_new_tokens=5)
    assert answer["generated_text"].startswith("Once upon")
    assert fake.bodies[0]["parameters"] == {"max_new_tokens": 5, "adapter_id": "pirate"}


def test_without_an_adapter_none_is_named(fake):
    Server(fake.url).generate("Hello")
    assert fake.bodies[0]["parameters"] == {}


def test_a_stream_yields_each_token_and_ends_with_details(fake):
    events = list(Server(fake.url).stream("Hello"))
    assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == events[-1]["generated_text"]
    assert events[-1]["details"]["finish_reason"] == "eos_token"


def test_a_refused_request_raises_the_servers_own_words(fake):
    with pytest.raises(ServerError, match=r"404 on /generate: unknown adapter nobody"):
        Server(fake.url).generate("Hello", "nobody")


def test_a_stream_that_breaks_raises_after_its_tokens(fake):
    stream = Server(fake.url).stream("Hello", "breaks")
    assert [next(stream)["token"]["text"], next(stream)["token"]["text"]] == ["Once", " upon"]
    with pytest.raises(ServerError, match="the shard is gone"):
        next(stream)


def test_closing_a_stream_hangs_up(fake):
    stream = Server(fake.url).stream("Hello", "endless")
    next(stream)
    stream.close()
    assert fake.left.wait(10)


def test_chat_whole_and_streamed(fake):
    server, messages = Server(fake.url), [{"role": "user", "content": "Hi"}]
    assert server.chat(messages, "pirate") == "pirate: Hi"
    assert "".join(server.stream_chat(messages)) == "Once upon a <b>time</b>."
    assert [body["model"] for body in fake.bodies] == ["pirate", "tgi"]


def test_the_api_key_travels_as_a_bearer_token(fake):
    Server(fake.url, api_key="secret").generate("Hello")
    assert fake.bodies[0]["key"] == "Bearer secret"


def test_no_server_is_said_in_one_line():
    with pytest.raises(ServerError, match=r"no server at http://127.0.0.1:9 .*make run"):
        Server("http://127.0.0.1:9").adapters()


def test_the_whole_example_prints_every_adapter(fake, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local_api.py", "--url", fake.url])
    assert local_api.main() == 0
    printed = capsys.readouterr().out
    for name in ("base", "pirate", "news"):
        assert f"--- {name}" in printed
