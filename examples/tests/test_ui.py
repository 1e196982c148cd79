"""The page's parts against the fake server, and the page itself."""

import threading
import time

import pytest

gr = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'kvrun[ui]'")

import ui  # noqa: E402
from local_api import Server  # noqa: E402

GREEDY = ui.Ask("Hello", chat=False, tokens=16, temperature=0, top_p=1, top_k=0, repetition=1, seed=None)


def last(columns_over_time):
    *_, columns = columns_over_time
    return columns


def test_all_columns_stream_at_the_same_time(fake):
    fake.gate = threading.Barrier(3)  # no stream goes on before three are open
    columns = last(ui.race(Server(fake.url), GREEDY, ["base", "pirate", "news"]))
    assert [column.text for column in columns] == ["Once upon a <b>time</b>."] * 3
    assert all(column.tokens == 6 and not column.error for column in columns)
    assert sorted(body["parameters"].get("adapter_id", "base") for body in fake.bodies) == ["base", "news", "pirate"]


def test_one_columns_error_is_shown_there_and_stops_no_other(fake):
    columns = last(ui.race(Server(fake.url), GREEDY, ["base", "nobody", "breaks"]))
    assert [column.error for column in columns] == ["", "404 on /generate_stream: unknown adapter nobody", "the shard is gone"]
    assert columns[2].text == "Once upon"
    assert ui.cards(columns).count('class="error"') == 2


def test_stopping_hangs_up_every_stream(fake):
    race = ui.race(Server(fake.url), GREEDY, ["endless"])
    next(race)
    race.close()
    assert fake.left.wait(10)


def test_no_server_is_an_error_in_the_column():
    (column,) = last(ui.race(Server("http://127.0.0.1:9"), GREEDY, ["base"]))
    assert "no server at" in column.error


def test_text_of_a_model_is_never_markup(fake):
    shown = ui.cards(last(ui.race(Server(fake.url), GREEDY, ["base"])))
    assert "&lt;b&gt;time" in shown
    assert "<b>" not in shown


def test_the_speed_counts_from_the_first_token():
    column = ui.Column("base", started=10.0)
    assert column.speed() == "waiting"
    for second in (10.5, 10.6, 10.7):
        column.add("x", second)
    column.ended = 11.5
    assert column.speed() == "3 tokens · first after 500 ms · 2 tokens/s"


@pytest.mark.parametrize(
    ("change", "sent"),
    [
        ({}, {"max_new_tokens": 16}),
        ({"top_k": 5, "seed": 3}, {"max_new_tokens": 16}),  # greedy needs neither
        ({"temperature": 0.5}, {"max_new_tokens": 16, "do_sample": True, "temperature": 0.5}),
        (
            {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 3, "repetition": 1.1},
            {"max_new_tokens": 16, "do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 3, "repetition_penalty": 1.1},
        ),
        ({"chat": True}, {"max_tokens": 16, "temperature": 0}),
        ({"chat": True, "temperature": 0.5, "seed": 3}, {"max_tokens": 16, "temperature": 0.5, "seed": 3}),
    ],
)
def test_only_controls_that_are_on_are_sent(change, sent):
    assert ui.Ask(**{**vars(GREEDY), **change}).parameters() == sent


def test_a_chat_message_goes_through_the_chat_route(fake):
    (column,) = last(ui.race(Server(fake.url), ui.Ask(**{**vars(GREEDY), "chat": True}), ["pirate"]))
    assert (column.text, column.tokens) == ("Once upon a <b>time</b>.", 5)
    assert (fake.bodies[0]["path"], fake.bodies[0]["model"]) == ("/v1/chat/completions", "pirate")


def test_the_menu_comes_from_the_server_without_failed_adapters(fake):
    choices, line = ui.menu(Server(fake.url))
    assert choices == [("pirate (rank 8)", "pirate"), ("news (rank 4 to 16)", "news")]
    assert "demo" in line


def test_the_menu_says_why_it_is_empty():
    choices, line = ui.menu(Server("http://127.0.0.1:9"))
    assert choices == []
    assert "no server at" in line


def test_the_page_serves_and_its_buttons_work(fake):
    from gradio_client import Client

    blocks = ui.page(Server(fake.url))
    _, url, _ = blocks.queue().launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        client = Client(url, verbose=False)
        client.predict(api_name="/opened")
        menu, line = client.predict(["news"], api_name="/refresh")
        assert menu["value"] == ["news"]
        assert "2 adapters" in line
        job = client.submit("Hello", "plain text", ["pirate"], 16, 0, 1, 0, 1, None, api_name="/compare")
        shown = job.result(timeout=30)
        assert shown.count("<section") == 2
        assert "pirate" in shown
        assert "done" in shown
    finally:
        blocks.close()
        time.sleep(0.1)
