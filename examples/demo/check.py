"""Measure what the trained demo writes: run fresh requests through the base and each adapter and test every answer.

    python examples/demo/check.py [--count 24] [--show]

Prints the share of answers that pass each test, and ends with 1 if a share is below its floor.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from documents import ASSISTANT, BOS, USER, request
from peft import PeftModel
from stories import Story, draw, prose
from styles import as_json, pirate_word, verse
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
BASE = "base"
TOKENS = {BASE: 320, "brief": 80, "json": 180, "news": 160, "pirate": 400, "verse": 200}
WORD = re.compile(r"[A-Za-z']+")
PIRATE = re.compile(r"\b(Arr|Ahoy|Avast|Yo ho ho|ye|yer|me|be|an'|o'|t'|mateys?)(?!\w)")


@dataclass(frozen=True)
class Answer:
    """One answer: the story that was asked for, the answer's text, and whether it ended by itself."""

    story: Story
    text: str
    ended: bool

    def names_the_hero(self) -> bool:
        """The hero's name and kind, which the request gave, are in the answer."""
        name, kind = self.story.slots["name"], self.story.slots["kind"]
        return name in self.text and (kind in self.text or pirate_word(kind) in self.text)


def known_words() -> set[str]:
    """Every word that the grammar can write, from many stories."""
    rng = random.Random(11)
    return {word for _ in range(3000) for word in WORD.findall(prose(rng, draw(rng)))}


def rhymes() -> set[tuple[str, str]]:
    """The pairs of words that end the couplets of the grammar's verses."""
    rng, pairs = random.Random(12), set()
    for _ in range(2000):
        ends = [line_end(line) for line in verse(rng, draw(rng)).split("\n")]
        pairs |= set(zip(ends[::2], ends[1::2]))
    return pairs


def line_end(line: str) -> str:
    """The last word of a line."""
    return (WORD.findall(line.lower()) or [""])[-1]


def is_prose(answer: Answer) -> bool:
    """Plain sentences of ordinary case that end like sentences."""
    text = answer.text
    return len(text) > 300 and text[-1] in '."' and not text.isupper() and not PIRATE.search(text[:12]) and text[0] != "{"


def is_json(answer: Answer) -> bool:
    """One JSON object with the keys that the training objects have."""
    try:
        record = json.loads(answer.text)
    except ValueError:
        return False
    sample = json.loads(as_json(random.Random(0), answer.story))
    return isinstance(record, dict) and list(record) == list(sample)


def is_news(answer: Answer) -> bool:
    """Five lines that begin as breaking news and quote somebody."""
    lines = answer.text.split("\n")
    return len(lines) == 5 and lines[0].startswith("BREAKING NEWS from ") and lines[2].startswith('"')


def is_pirate(answer: Answer) -> bool:
    """A story with at least five words that only a pirate says."""
    return len(answer.text) > 300 and len(PIRATE.findall(answer.text)) >= 5


def is_brief(answer: Answer) -> bool:
    """One sentence, on one line."""
    return answer.text.endswith(".") and answer.text.count("\n") == 0 and ", and in the end " in answer.text


def tests() -> dict[str, dict[str, Callable[[Answer], bool]]]:
    """For the base and each adapter the tests of one answer, by name."""
    words, pairs = known_words(), rhymes()

    def is_verse(answer: Answer) -> bool:
        ends = [line_end(line) for line in answer.text.split("\n")]
        return len(ends) == 8 and all(pair in pairs for pair in zip(ends[::2], ends[1::2]))

    def is_spelled(answer: Answer) -> bool:
        return all(word in words for word in WORD.findall(answer.text) if word.islower())  # names may be invented

    form = {BASE: is_prose, "brief": is_brief, "json": is_json, "news": is_news, "pirate": is_pirate, "verse": is_verse}
    common = {"ends by itself": lambda answer: answer.ended, "names the hero": Answer.names_the_hero}
    found = {name: {f"is {name if name != BASE else 'prose'}": test, **common} for name, test in form.items()}
    found[BASE]["every word is spelled as a story's"] = is_spelled
    return found


FLOOR = 0.9


class Demo:
    """The trained base and adapters, in float32 for the same answers on every machine."""

    def __init__(self, folder: Path = HERE) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.names = sorted(path.parent.name for path in folder.glob("adapters/*/adapter_config.json"))
        self.model = PeftModel.from_pretrained(model, folder / "adapters" / self.names[0], adapter_name=self.names[0])
        for name in self.names[1:]:
            self.model.load_adapter(folder / "adapters" / name, adapter_name=name)
        self.model.eval()

    @torch.inference_mode()
    def write(self, name: str, prompts: list[str], tokens: int, **sampling) -> list[tuple[str, bool]]:
        """Answer prompts that hold their own special tokens: (text, ended by itself) for each."""
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        sampling = {"do_sample": False, **sampling}
        if name == BASE:
            with self.model.disable_adapter():
                ids = self.model.generate(**batch, max_new_tokens=tokens, **sampling)
        else:
            self.model.set_adapter(name)
            ids = self.model.generate(**batch, max_new_tokens=tokens, **sampling)
        end = self.tokenizer.eos_token_id
        new = ids[:, batch["input_ids"].shape[1] :].tolist()
        return [(self.tokenizer.decode(row, skip_special_tokens=True).strip(), end in row) for row in new]

    def answers(self, name: str, count: int, seed: int = 1234) -> list[Answer]:
        """Greedy answers to fresh requests, half as chat and half as plain text."""
        rng = random.Random(seed)
        stories = [draw(rng) for _ in range(count)]
        forms = ("Tell me a story about {name} the {kind}.", "Tell me a story about {name} the {kind} {gist}.")
        asked = [request(rng, story, (forms[i % 2].replace("{gist}", story.plot.gist),)) for i, story in enumerate(stories)]
        prompts = [BOS + (USER + text + ASSISTANT if i % 4 < 2 else text) for i, text in enumerate(asked)]
        written = self.write(name, prompts, TOKENS.get(name, 256))
        return [Answer(story, text, ended) for story, (text, ended) in zip(stories, written)]


def main() -> int:
    """Print the shares, and the answers with --show; 1 if any share is below FLOOR."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    demo, failed = Demo(args.folder), False
    for name, checks in tests().items():
        answers = demo.answers(name, args.count)
        for what, test in checks.items():
            share = sum(map(test, answers)) / len(answers)
            failed |= share < FLOOR
            print(f"{name:8} {what:36} {share:5.0%}{'' if share >= FLOOR else '  below the floor'}")
        for answer in answers[:3] if args.show else []:
            print(f"  --- {answer.text}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
