"""The grammar behind the demo: complete sentences, one seed one text, and facts that hold through every telling."""

import itertools
import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from documents import base_document, styled_document
from plots import PLOTS
from stories import draw, prose
from styles import STYLES

TELLINGS = {"prose": prose, **STYLES}


def tellings(name, count=400):
    rng = random.Random(name)
    for _ in range(count):
        story = draw(rng)
        yield story, TELLINGS[name](rng, story)


@pytest.mark.parametrize("name", TELLINGS)
def test_no_choice_and_no_slot_is_left_open(name):
    for _, text in tellings(name):
        assert not set(text if name != "json" else "") & set("[]{}|"), text
        assert "  " not in text


@pytest.mark.parametrize("name", TELLINGS)
def test_every_telling_names_the_hero(name):
    for story, text in tellings(name):
        assert story.slots["name"].lower() in text.lower()


def test_the_article_fits_the_next_word():
    for _, text in tellings("prose"):
        words = text.lower().replace('"', "").split()
        for article, word in itertools.pairwise(words):
            assert article != "a" or word[0] not in "aeiou", (article, word)
            assert article != "an" or word[0] in "aeiou", (article, word)


def test_sentences_begin_with_a_capital():
    for _, text in tellings("prose"):
        for paragraph in text.split("\n\n"):
            assert paragraph.lstrip('"')[0].isupper(), paragraph


def test_json_is_json_with_the_storys_facts():
    for story, text in tellings("json"):
        record = json.loads(text)
        assert record["hero"].startswith(story.slots["name"])
        assert record["friend"].startswith(story.slots["friend"])


def test_every_plot_has_verses_of_four_lines_and_fills():
    rng = random.Random(1)
    for plot in PLOTS:
        assert plot.beats
        assert [verse.count("\n") for verse in plot.verses] == [3] * len(plot.verses)
        for options in plot.options:
            assert options.keys() == plot.options[0].keys()
    assert {draw(rng).plot.title for _ in range(400)} == {plot.title for plot in PLOTS}


@pytest.mark.parametrize("document", [base_document, *(lambda rng, s=s: styled_document(rng, s) for s in STYLES)])
def test_one_seed_gives_one_text_and_two_seeds_two(document):
    texts = [document(random.Random(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stories_do_not_repeat():
    assert len({text for _, text in tellings("prose", 1000)}) == 1000
