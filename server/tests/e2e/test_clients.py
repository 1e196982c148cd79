"""Clients as people have them: the openai package, and the repository's own example."""

import subprocess
import sys

from tree import ROOT, demo_adapters

ADAPTER = sorted(demo_adapters())[0] if demo_adapters() else ""


def openai_client(tree):
    from openai import OpenAI

    return OpenAI(base_url=tree.url + "/v1", api_key="none", max_retries=0)


def test_completions_stream_the_same_text_as_they_return_whole(demo):
    client = openai_client(demo)
    whole = client.completions.create(model="tgi", prompt="The old farmer", max_tokens=40, temperature=0)
    parts = list(client.completions.create(model="tgi", prompt="The old farmer", max_tokens=40, temperature=0, stream=True))
    assert "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text
    assert whole.usage.completion_tokens <= 40


def test_chat_with_an_adapter_as_the_model(demo):
    client = openai_client(demo)
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    base = client.chat.completions.create(model="tgi", messages=messages, max_tokens=60, temperature=0)
    tuned = client.chat.completions.create(model=ADAPTER, messages=messages, max_tokens=60, temperature=0)
    assert base.choices[0].message.content != tuned.choices[0].message.content
    streamed = client.chat.completions.create(
        model=ADAPTER, messages=messages, max_tokens=60, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for chunk in streamed:
        text += "".join(c.delta.content or "" for c in chunk.choices)
        usage = chunk.usage or usage
    assert text == tuned.choices[0].message.content
    assert usage.completion_tokens == tuned.usage.completion_tokens


def test_the_model_list_names_the_base_and_every_adapter(demo):
    assert {m.id for m in openai_client(demo).models.list()} >= set(demo_adapters())


def test_an_unknown_model_is_a_404_and_never_the_base(demo):
    import openai

    try:
        openai_client(demo).completions.create(model="nobody", prompt="x", max_tokens=1)
    except openai.NotFoundError as error:
        assert "nobody" in str(error)
    else:
        raise AssertionError("answered by the base model")


def test_seeded_answers_repeat(demo):
    client = openai_client(demo)
    texts = {
        client.completions.create(model="tgi", prompt="The king", max_tokens=30, temperature=1.0, seed=7).choices[0].text for _ in range(3)
    }
    assert len(texts) == 1


def test_the_example_client_runs_to_its_end(demo):
    done = subprocess.run(
        [sys.executable, "examples/local_api.py", "--url", demo.url], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in demo_adapters():
        assert name in done.stdout
