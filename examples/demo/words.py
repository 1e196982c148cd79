"""The word lists behind the stories, read from words.txt: who, where, what and how it feels."""

from __future__ import annotations

from pathlib import Path

LINES = [line.split(": ", 1) for line in Path(__file__).with_suffix(".txt").read_text().splitlines() if line]
LISTS = {key: value.split(", ") for key, value in LINES if key != "place"}

ANIMALS, GIRLS, BOYS, TRAITS = LISTS["animals"], LISTS["girls"], LISTS["boys"], LISTS["traits"]
COLOURS, THINGS, TREATS = LISTS["colours"], LISTS["things"], LISTS["treats"]
TIMES, HOBBIES = LISTS["times"], LISTS["hobbies"]
FIRST_SYLLABLES, LAST_SYLLABLES = LISTS["first_syllables"], LISTS["last_syllables"]

# How one is there, and five spots where something can be hidden or happen.
PLACES = {at: spots.split(", ") for key, value in LINES if key == "place" for at, spots in [value.split(" = ")]}
