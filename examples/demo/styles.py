"""Other tellings of a story's facts, one function per adapter.

Each takes (rng, story) and returns text; each is plainly unlike the prose of stories.py.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from stories import Story, prose, title

PIRATE_WORDS = {
    "you": "ye", "your": "yer", "my": "me", "is": "be", "are": "be", "am": "be", "friend": "matey", "friends": "mateys",
    "hello": "ahoy", "yes": "aye", "and": "an'", "of": "o'", "little": "wee", "small": "wee", "very": "mighty",
    "never": "ne'er", "for": "fer", "over": "o'er", "them": "'em", "money": "doubloons", "story": "yarn",
    "wonderful": "grand", "good": "fine", "happy": "jolly", "to": "t'", "boy": "lad", "girl": "lass", "old": "salty",
    "everyone": "all hands", "himself": "hisself", "looked": "peered", "thought": "reckoned",
    "strong": "stout", "sad": "gloomy", "sadly": "gloomily", "afraid": "afeard", "stop": "belay", "food": "grub",
    "people": "landlubbers", "drink": "grog", "play": "make merry", "house": "cabin", "friendship": "mateyship",
}  # fmt: skip
PIRATE_OPENINGS = (
    "Ahoy, mateys!", "Arr, gather round!", "Avast, ye landlubbers!", "Yo ho ho! Here be a yarn.", "Arr! Listen well.",
)  # fmt: skip
PIRATE_CRIES = ("Arr!", "Yo ho ho!", "Shiver me timbers!", "Blow me down!", "Aye!")
PIRATE_ENDINGS = ("An' that be the end o' me yarn. Arr!", "Yo ho ho!", "So says I, an' I be no liar. Arr!")
WORD = re.compile(r"[A-Za-z']+")
SENTENCE_END = re.compile(r"([.!?]) (?=[A-Z])")

VERSE_OPENINGS = (
    "There once was {who}, and {name} was {his} name,\nand no two of {his} days were exactly the same.",
    "Come listen, my dear, to a rhyme that is true,\nof {name} the {kind} and a good friend or two.",
    "Now hush and be still, for the evening is long,\nand of {name} the {kind} I will sing you a song.",
    "Let me tell you of {name}, {who} I once met,\nwhose story, I promise, you will not forget.",
)
VERSE_CLOSINGS = (
    "So sleep, little one, for the stars are all bright,\nand {name} and {friend} wish you a good night.",
    "And that is the end of the tale that I know,\nthe moon is up high and the lamp is down low.",
    "Now {name} and {friend} are the best friends of all,\nin winter and summer, in spring and in fall.",
    "My song is now over, my story is done,\nand {name} and {friend} are asleep with the sun.",
)

NEWS_QUOTES = (
    "it was quite a day", "i could not believe it", "i will tell my grandchildren about it", "i was not ready for this",
    "no comment",
)  # fmt: skip
NEWS_ENDINGS = ("more at six o'clock", "now to the weather: rain", "this was the evening news", "stay tuned")


def pirate(rng: random.Random, story: Story) -> str:
    """The prose story as an old pirate would tell it."""
    text = WORD.sub(lambda m: pirate_word(m.group(0)), prose(rng, story))
    text = SENTENCE_END.sub(lambda m: m.group(0) + (rng.choice(PIRATE_CRIES) + " " if rng.random() < 0.08 else ""), text)
    return f"{rng.choice(PIRATE_OPENINGS)} {text} {rng.choice(PIRATE_ENDINGS)}"


def pirate_word(word: str) -> str:
    """One word in pirate speech, its capital kept."""
    low = word.lower()
    spoken = PIRATE_WORDS.get(low, low)
    if spoken == low and low.endswith("ing") and len(low) > 5:
        spoken = low[:-1] + "'"
    if spoken == low:
        return word
    return spoken.capitalize() if word[0].isupper() else spoken


def as_json(rng: random.Random, story: Story) -> str:
    """The story's facts as one JSON object on one line."""
    s = story.slots
    record = {
        "title": title(rng, story),
        "hero": f"{s['name']} the {s['trait']} {s['kind']}",
        "friend": f"{s['friend']} the {s['ftrait']} {s['fkind']}",
        "place": s["at"],
        "problem": story.fill(rng, story.plot.problem),
        "ending": story.fill(rng, story.plot.turn),
        "lesson": s["lesson"],
    }
    return json.dumps(record)


def news(rng: random.Random, story: Story) -> str:
    """Five lines of breaking news."""
    lines = (
        "BREAKING NEWS from {spotnoun}!",
        story.plot.problem + ".",
        f'"{rng.choice(NEWS_QUOTES)}," ' + "[says|said] {name}, {who}.",
        "later " + story.plot.turn + ".",
        "experts say: {lesson}! " + rng.choice(NEWS_ENDINGS) + ".",
    )
    return "\n".join(story.fill(rng, line) for line in lines)


def verse(rng: random.Random, story: Story) -> str:
    """Eight rhymed lines in four couplets."""
    parts = (rng.choice(VERSE_OPENINGS), rng.choice(story.plot.verses), rng.choice(VERSE_CLOSINGS))
    lines = "\n".join(story.clause(rng, part) for part in parts).split("\n")
    return "\n".join(line[0].upper() + line[1:] for line in lines)


def brief(rng: random.Random, story: Story) -> str:
    """The whole story in one sentence."""
    problem = story.plot.problem.replace("{name}", "{name} the {kind}", 1)
    return story.fill(rng, "{at}, " + problem + ", and in the end " + story.plot.turn + ".")


STYLES: dict[str, Callable[[random.Random, Story], str]] = {
    "brief": brief,
    "json": as_json,
    "news": news,
    "pirate": pirate,
    "verse": verse,
}
