"""A seeded grammar of short stories: draws the facts, then tells them in prose.

A story is its facts; every other telling (verse, pirate, JSON ...) in styles.py is made from the same facts.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from plots import PLOTS, Plot
from words import (
    ANIMALS,
    BOYS,
    COLOURS,
    FIRST_SYLLABLES,
    GIRLS,
    HOBBIES,
    LAST_SYLLABLES,
    PLACES,
    THINGS,
    TIMES,
    TRAITS,
    TREATS,
)

CHOICE = re.compile(r"\[([^\[\]]*)\]")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
SENTENCE_START = re.compile(r"(^|[.!?] |\n|\")([a-z])")

OPENINGS = (
    "Once upon a time, there [was|lived] {who} named {name}. {name} [lived|had a small home] {at}.",
    "[Once|Long ago|Not so long ago], {who} named {name} lived {at}.",
    "{name} was {who}. {He} lived {at}.",
    "There once was {who} {at}. {His} name was {name}.",
    "{At} lived {who} named {name}.",
    "Somewhere {at} lived {who}, and {his} name was {name}.",
    "[One day|Every morning], {who} named {name} [woke up early|looked out of the window] {at}.",
    "This is the story of {name}, {who} who lived {at}.",
)
DETAILS = ("", "", "{He} loved {hobby}.", "{name} liked {hobby}.", "{He} lived in a [tiny|cosy|crooked|yellow] house.")
CLOSINGS = (
    "[From that day on|After that|Ever since], {name} and {friend} were [the best of friends|always together].",
    "And {name} learned something that day: {lesson_low}.",
    "{lesson}. The end.",
    "{name} never forgot that day. {lesson}.",
    '"{lesson}," said {name} that night, and {he} fell asleep with a smile.',
    "And they [lived happily ever after|were happy]. The end.",
)


@dataclass(frozen=True)
class Story:
    """The facts of one story: its plot and the words that fill the plot's slots."""

    plot: Plot
    slots: dict[str, str]

    def fill(self, rng: random.Random, template: str) -> str:
        """Expand choices and slots of a template into one string, sentence starts capitalised."""
        text = expand(rng, template, self.slots)
        return SENTENCE_START.sub(lambda m: m.group(1) + m.group(2).upper(), text)

    def clause(self, rng: random.Random, template: str) -> str:
        """Expand a template that stands inside a sentence: nothing is capitalised."""
        return expand(rng, template, self.slots)


def expand(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """Resolve [a|b] choices inside out, then {slots}, until none is left; then mend a/an."""
    while "[" in template or "{" in template:
        while CHOICE.search(template):
            template = CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), template, count=1)
        template = template.format_map(slots)
    return ARTICLE.sub(r"\1n ", template)


def pronouns(gender: str, prefix: str = "") -> dict[str, str]:
    """Slots such as he, him, his, He for one gender ("f" or "m"); prefix f names the friend's."""
    he, him, his = ("she", "her", "her") if gender == "f" else ("he", "him", "his")
    slots = {"he": he, "him": him, "his": his, "He": he.capitalize(), "His": his.capitalize(), "himself": him + "self"}
    return {prefix + key: value for key, value in slots.items()}


def person(rng: random.Random, avoid: str = "") -> tuple[str, str, str]:
    """Draw (name, kind, gender); the kind differs from `avoid`."""
    gender = rng.choice("fm")
    kinds = [kind for kind in ANIMALS if kind != avoid]
    kind = rng.choice(kinds)
    if rng.random() < 0.15:
        kind = "girl" if gender == "f" else "boy"
    if rng.random() < 0.15:  # so that a name never heard before can be repeated too
        return rng.choice(FIRST_SYLLABLES) + rng.choice(LAST_SYLLABLES), kind, gender
    return rng.choice(GIRLS if gender == "f" else BOYS), kind, gender


def draw(rng: random.Random) -> Story:
    """Draw the facts of one story."""
    plot = rng.choice(PLOTS)
    name, kind, gender = person(rng)
    friend, friend_kind, friend_gender = person(rng, avoid=kind)
    while friend == name:
        friend, friend_kind, friend_gender = person(rng, avoid=kind)
    trait, friend_trait = rng.sample(TRAITS, 2)
    at = rng.choice(list(PLACES))
    spots = rng.sample(PLACES[at], 3)
    slots = {
        "name": name, "kind": kind, "trait": trait, "who": f"a {trait} {kind}",
        "friend": friend, "fkind": friend_kind, "ftrait": friend_trait, "fwho": f"a {friend_trait} {friend_kind}",
        "at": at, "At": at[0].upper() + at[1:], "spotnoun": " ".join(at.split()[1:]),
        "spot": spots[0], "spot2": spots[1], "spot3": spots[2],
        "thing": f"{rng.choice(COLOURS)} {rng.choice(THINGS)}", "treat": rng.choice(TREATS),
        "time": rng.choice(TIMES), "time2": rng.choice(TIMES), "hobby": rng.choice(HOBBIES),
        "myself": "myself",
    }  # fmt: skip
    slots |= pronouns(gender) | pronouns(friend_gender, "f")
    slots |= rng.choice(plot.options)
    slots["lesson"] = expand(rng, plot.lesson, slots)
    slots["lesson_low"] = slots["lesson"][0].lower() + slots["lesson"][1:]
    for key in ("thing", "treat", "work", "fear", "skill"):
        if key in slots:
            slots[key.capitalize()] = slots[key].title()
    return Story(plot, slots)


def prose(rng: random.Random, story: Story) -> str:
    """Tell the story plainly, in two or three paragraphs of about 120 words together."""
    beats = [story.fill(rng, beat) for beat in story.plot.beats]
    opening = story.fill(rng, rng.choice(OPENINGS))
    detail = story.fill(rng, rng.choice(DETAILS))
    closing = story.fill(rng, rng.choice(CLOSINGS))
    cut = rng.choice((3, 4))
    first = " ".join(part for part in (opening, detail) if part)
    return "\n\n".join((first, " ".join(beats[:cut]), " ".join([*beats[cut:], closing])))


def title(rng: random.Random, story: Story) -> str:
    """The story's title, in title case as the plot has it."""
    return story.clause(rng, story.plot.title)
