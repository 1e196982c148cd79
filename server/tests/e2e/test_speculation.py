"""With guesses verified beside them, answers stay the same to the token: base and adapters, greedy and sampled."""

from tree import PROMPTS, demo_adapters, demo_flags, running, together


def requests(demo) -> list[dict]:
    """Answers that repeat their prompts, as a model that edits or quotes does, and answers that do not."""
    mix = []
    for i, prompt in enumerate(PROMPTS[:6]):
        told = prompt + demo.generate(prompt, max_new_tokens=60).text
        names = [None, *demo_adapters()]
        for text in (prompt, f"{told}\n{told}\n{prompt}"):
            request = {"prompt": text, "max_new_tokens": 50}
            if name := names[i % len(names)]:
                request["adapter_id"] = name
            if i % 2:
                request |= {"do_sample": True, "temperature": 0.7, "seed": i, "repetition_penalty": 1.1}
            mix.append(request)
    return mix


def test_answers_are_the_same_with_guesses(demo):
    mix = requests(demo)
    alone = [demo.generate(**request) for request in mix]
    with running(*demo_flags(), "--speculate", "4") as tree:
        one_by_one = [tree.generate(**request) for request in mix]
        beside = together([lambda r=r: tree.stream(**r) for r in mix])
        metrics = tree.metrics()
    for plain, single, stream in zip(alone, one_by_one, beside):
        assert plain.error is single.error is stream.error is None
        assert single.ids == plain.ids
        assert stream.ids == plain.ids
        tokens = zip(plain.details["tokens"], single.details["tokens"])
        assert all(abs(a["logprob"] - b["logprob"]) < 1e-6 for a, b in tokens)
    guessed, right = metrics["kvrun_guessed_tokens_total"], metrics["kvrun_guessed_right_tokens_total"]
    assert 0 < right < guessed
