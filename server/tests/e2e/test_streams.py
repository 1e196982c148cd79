"""Many streams of base and adapters in one batch: each equals itself alone, and everything taken is given back."""

import random
import time

from tree import PROMPTS, demo_adapters, together


def requests(count: int, seed: int = 0) -> list[dict]:
    """A fixed mix of base and adapters, greedy and sampled, seeded."""
    rng = random.Random(seed)
    names = [None, *demo_adapters()]
    mix = []
    for i in range(count):
        request = {"prompt": rng.choice(PROMPTS), "max_new_tokens": rng.randint(8, 80)}
        if names[i % len(names)]:
            request["adapter_id"] = names[i % len(names)]
        if rng.random() < 0.5:
            request |= {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": rng.randrange(2**32)}
        mix.append(request)
    return mix


def idle(tree, timeout: float = 10) -> dict[str, float]:
    """The gauges once nothing runs and nothing waits."""
    limit = time.monotonic() + timeout
    while True:
        gauges = tree.metrics()
        if gauges["kvrun_kv_pages_used"] == 0 and gauges["tgi_queue_size"] == 0 and gauges["tgi_batch_current_size"] == 0:
            return gauges
        assert time.monotonic() < limit, {k: v for k, v in gauges.items() if "pages" in k or "queue" in k or "batch_current" in k}
        time.sleep(0.05)


def test_64_streams_with_a_third_cancelled_each_equal_their_answer_alone(demo):
    mix = requests(64)
    alone = [demo.generate(**r) for r in mix]
    assert not [a.error for a in alone if a.error]
    rng = random.Random(1)
    cut = [rng.randint(1, 6) if i % 3 == 0 else None for i in range(len(mix))]
    mixed = together([lambda r=r, n=n: demo.stream(stop_after=n, **r) for r, n in zip(mix, cut)])
    for single, stream, stopped in zip(alone, mixed, cut):
        assert stream.error is None
        if stopped is None:
            assert (stream.ids, stream.text, stream.terminals) == (single.ids, single.text, 1)
        else:
            assert stream.ids == single.ids[: len(stream.ids)]
    gauges = idle(demo)
    assert gauges["kvrun_kv_pages_free"] + gauges["kvrun_kv_pages_cached"] == gauges["kvrun_kv_pages_total"]


def test_the_answer_names_the_adapter_and_its_digest(demo):
    listed = {a["name"]: a for a in demo.client().get("/v1/adapters").json()["data"]}
    assert set(listed) >= set(demo_adapters())
    for name in demo_adapters():
        details = demo.generate("The old farmer", max_new_tokens=4, adapter_id=name).details
        assert details["adapter"] == {"id": name, "digest": listed[name]["digest"]}
        assert len(listed[name]["digest"]) == 64


def test_adapters_come_and_go_over_http_while_requests_run(demo):
    name, http = "visitor", demo.client()
    source = next(iter(demo_adapters()))
    alone = demo.generate("The king", max_new_tokens=60, adapter_id=source).ids
    runners = [lambda: demo.stream("The king", max_new_tokens=60, adapter_id=source).ids] * 6

    def come_and_go():
        for _ in range(5):
            made = http.post("/v1/adapters", json={"name": name, "path": source})
            assert made.status_code in (200, 201), made.text
            assert demo.generate("The king", max_new_tokens=60, adapter_id=name).ids == alone
            assert http.delete(f"/v1/adapters/{name}").status_code in (200, 202)
            limit = time.monotonic() + 60
            while (
                reply := http.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": name, "max_new_tokens": 1}})
            ).status_code != 404:
                assert time.monotonic() < limit, reply.text

    results = together([come_and_go, *runners])
    assert all(ids == alone for ids in results[1:])
    idle(demo)
