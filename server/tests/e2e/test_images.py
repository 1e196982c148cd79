"""Images through HTTP, as clients of OpenAI and of TGI send them: a real router over an engine, answers as transformers gives them."""

import base64
import json

import httpx
import openai
import pytest
import torch
from kvrun.spec import Config, model_of
from pictures import Oracle, picture
from test_rows import router, shard
from tokenizers import Tokenizer

NEW = 12
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}MARKER{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
CUT_SHORT = picture(200, 150, seed=3, kind="JPEG")[:-2000]  # its header is whole, so that the router can measure it
WIDE, TALL = picture(61, 17, seed=1), picture(23, 40, seed=2, kind="JPEG")


def url_of(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


class Served:
    """A tiny model that sees, behind a router, and transformers' side of it."""

    def __init__(self, folder, url: str) -> None:
        self.url, self.oracle = url, Oracle(folder)
        self.images = model_of(Config.read(folder)).images
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)

    def chat(self, parts: list[str | bytes], **more):
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": url_of(part)}}
            for part in parts
        ]
        return self.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=NEW,
            logit_bias={str(self.images.token): -100},
            **more,
        )

    def tokens(self, parts: list[str | bytes]) -> list[int]:
        return self.oracle.ids(parts, self.images.marker)

    def expected(self, parts: list[str | bytes]) -> str:
        """transformers' greedy answer, never an id that stands for an image or for nothing."""
        tokens, files = self.tokens(parts), [part for part in parts if isinstance(part, bytes)]
        answer: list[int] = []
        while len(answer) < NEW and 2 not in answer:
            scores = self.oracle.logits([*tokens, *answer], files)[-1].clone()
            scores[self.images.token] = scores[self.tokenizer.get_vocab_size() :] = -torch.inf
            answer.append(int(scores.argmax()))
        return self.tokenizer.decode(answer, skip_special_tokens=True)


@pytest.fixture(params=["llava_next", "idefics2", "gemma3_image", "gemma3_panned", "idefics"])
def served(request, checkpoint, tmp_path):
    folder = checkpoint(request.param)
    marker = model_of(Config.read(folder)).images.marker
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE.replace("MARKER", marker)}))
    with shard(folder, tmp_path / "s-0"), router(folder, tmp_path / "s") as url:
        yield Served(folder, url)


def test_a_chat_with_images_is_answered_as_by_transformers(served):
    # No page ends within an image: pages of those whose ids see each other are shared in whole images only.
    parts = ["What is this in ", WIDE, " beside ", TALL, "?"]
    said = served.chat(parts)
    assert said.usage.prompt_tokens == len(served.tokens(parts))
    assert said.choices[0].message.content == served.expected(parts)
    # The same image again, from the prefix cache, and another in its place.
    again = served.chat(parts)
    assert again.choices[0].message.content == said.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens >= len(served.tokens(parts)) // 2
    other = ["What is this in ", TALL, " beside ", WIDE, "?"]
    assert served.chat(other).choices[0].message.content == served.expected(other)


WRITTEN = {
    "between words": ["See ", WIDE, " and say"],
    "right beside words": ["See", WIDE, "and", TALL, "say"],
    "beside each other": ["x", WIDE, TALL, WIDE, "y"],
    "with nothing but spaces between": ["  x", WIDE, " ", TALL, "   ", WIDE, "y  "],
    "beside line breaks": ["a\n", WIDE, "\nb\n\n", TALL, "\n", WIDE, " \n"],
    "at both ends": [TALL, "z", WIDE],
    "alone": [WIDE],
    "before a sign": [WIDE, "<b", TALL, "\u2003c", WIDE, "\u00e9"],
    "none": [" No image\n "],
}


def test_texts_with_images_become_the_ids_that_transformers_processor_makes(served):
    found, expected = {}, {}
    with httpx.Client(base_url=served.url, timeout=120) as client:
        for name, parts in WRITTEN.items():
            markdown = "".join(part if isinstance(part, str) else f"![]({url_of(part)})" for part in parts)
            parameters = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
            reply = client.post("/generate", json={"inputs": markdown, "parameters": parameters})
            assert reply.status_code == 200, reply.text
            found[name] = [token["id"] for token in reply.json()["details"]["prefill"]]
            expected[name] = served.tokens(parts)
    assert found == expected


def test_an_image_that_breaks_on_the_shard_is_refused_as_one_that_breaks_in_the_router(served):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="the image cannot be read"):
            served.chat(["What is ", CUT_SHORT, "?"], stream=stream)
    with httpx.Client(base_url=served.url, timeout=120) as client:
        for route in ("/generate", "/generate_stream"):
            reply = client.post(route, json={"inputs": f"What is ![]({url_of(CUT_SHORT)})?"})
            assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    parts = ["What is ", TALL, "?"]
    assert served.chat(parts).choices[0].message.content == served.expected(parts)
