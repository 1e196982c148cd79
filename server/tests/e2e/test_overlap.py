"""With the next step sent while one is computed, answers stay the same to the token, however they end."""

import os
import signal

import pytest
from tree import PROMPTS, demo_adapters, demo_flags, running, together


@pytest.fixture(scope="module")
def overlapped():
    with running(*demo_flags(), "--overlap", "on") as tree:
        yield tree


def requests() -> list[dict]:
    """Base and adapters, greedy and seeded, ended by length, by the model's end token and by a stop string."""
    mix = []
    for i, prompt in enumerate(PROMPTS[:6]):
        names = [None, *demo_adapters()]
        for ending in ({"max_new_tokens": 1 + 7 * i}, {"max_new_tokens": 300}, {"max_new_tokens": 80, "stop": [".", " the"]}):
            request = {"prompt": prompt, "decoder_input_details": i == 0, **ending}
            if name := names[i % len(names)]:
                request["adapter_id"] = name
            if i % 2:
                request |= {"do_sample": True, "temperature": 0.7, "seed": i, "repetition_penalty": 1.1}
            mix.append(request)
    return mix


def test_answers_are_the_same_with_two_steps_in_flight(demo, overlapped):
    mix = requests()
    alone = [demo.generate(**request) for request in mix]
    one_by_one = [overlapped.generate(**request) for request in mix]
    streams = [{k: v for k, v in request.items() if k != "decoder_input_details"} for request in mix]
    beside = together([lambda r=r: overlapped.stream(**r) for r in streams])
    for plain, single, stream in zip(alone, one_by_one, beside, strict=True):
        assert plain.error is single.error is stream.error is None
        assert (single.ids, single.text, single.finish) == (plain.ids, plain.text, plain.finish)
        assert (stream.ids, stream.text, stream.finish) == (plain.ids, plain.text, plain.finish)
        for told in ("tokens", "prefill"):
            pairs = zip(plain.details[told], single.details[told], strict=True)
            assert all(a["logprob"] == b["logprob"] or abs(a["logprob"] - b["logprob"]) < 1e-6 for a, b in pairs)
    assert {answer.finish for answer in alone} == {"length", "eos_token", "stop_sequence"}


def test_info_and_metrics_say_whether_steps_overlap(demo, overlapped):
    demo.generate("The king", max_new_tokens=20)
    overlapped.generate("The king", max_new_tokens=20)
    for tree, on in ((demo, False), (overlapped, True)):
        with tree.client() as http:
            assert http.get("/info").json()["overlap"] is on
        assert (tree.metrics().get("kvrun_router_hidden_seconds_count", 0) > 0) is on


def test_clients_that_leave_give_their_pages_back(overlapped):
    leaving = [lambda p=p: overlapped.stream(p, stop_after=5, max_new_tokens=400) for p in PROMPTS[:6]]
    staying = [lambda p=p: overlapped.stream(p, max_new_tokens=40) for p in PROMPTS[:6]]
    alone = [overlapped.generate(p, max_new_tokens=40) for p in PROMPTS[:6]]
    answers = together([*leaving, *staying])
    assert [a.ids for a in answers[:6]] == [a.ids[:5] for a in alone]
    assert [a.ids for a in answers[6:]] == [a.ids for a in alone]
    overlapped.generate("The king", max_new_tokens=20)
    assert overlapped.metrics()["kvrun_kv_pages_used"] == 0


def test_streams_outlive_a_model_process_with_two_steps_in_flight(demo):
    whole = [demo.generate(p, max_new_tokens=150, ignore_eos_token=True) for p in PROMPTS[:3]]
    with running(*demo_flags(), "--overlap", "on") as tree:

        def kill(answer) -> None:
            if len(answer.ids) == 20:
                os.kill(tree.shards()[0], signal.SIGKILL)

        calls = [
            lambda p=p, k=k: tree.stream(p, on_token=k, max_new_tokens=150, ignore_eos_token=True)
            for p, k in zip(PROMPTS, (kill, None, None))
        ]
        streams = together(calls)
        assert [s.ids for s in streams] == [w.ids for w in whole]
        assert tree.metrics()["kvrun_replayed_requests_total"] > 0
