"""What the model reads: plain stories, requests with their stories, and short talks.

A document is a list of (text, learn) spans between <s> and </s>; the adapters learn only the spans marked True.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from stories import Story, draw, expand, prose, title
from styles import STYLES, brief

Span = tuple[str, bool]
Telling = Callable[[random.Random, Story], str]

BOS, EOS, USER, ASSISTANT, SYSTEM = "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL = (BOS, EOS, USER, ASSISTANT, SYSTEM)

SUBJECTS = (
    "a {kind}", "a {kind}", "{who}", "a {kind} named {name}", "{who} named {name}", "{name} the {kind}",
    "{name} the {kind} and {friend} the {fkind}", "a {kind} and a {fkind}",
)  # fmt: skip
REQUESTS = (
    "Tell me a story about {topic}.",
    "Tell me a story about {topic}",
    "Tell me a [short |little |bedtime |]story about {topic}.",
    "[Please tell|Can you tell|Could you tell] me a story about {topic}?",
    "Write [a story|a short story|something] about {topic}.",
    "I would like [to hear |]a story about {topic}[, please|].",
    "[Make up|Invent] a story about {topic}.",
    "A story about {topic}, please.",
)
SHORT = (  # short answers, whose every word hangs on the request
    ("In one sentence: {topic}.", brief),
    ("Tell me in one sentence about {topic}.", brief),
    ("Give me a title for a story about {topic}.", title),
    ("What is a good title for a story about {topic}?", title),
)
AGAIN = ("[Another one, please|And now|Now tell me] one about {topic}.", "Tell me a story about {topic} now.")
SYSTEMS = ("You are a storyteller.", "You tell short stories to children.", "You are a helpful assistant.")
TALK = (
    ("[Hello|Hi|Hey|Good morning|Hello there][!|.|]", "Hello! [Shall I tell you a story about a {kind}?|Would you like a story?]"),
    ("[Who are you|What are you|What is your name]?", "I am a very small model that tells stories. Ask me for one about a {kind}!"),
    ("[What can you do|Can you help me|Help]?", "I can tell short stories. Try: tell me a story about {who}."),
    ("[Thank you|Thanks|That was nice|Good night][!|.]", "[You are welcome!|Sleep well!|Come back soon!]"),
    ("[How are you|How do you do]?", "I am well, thank you. I just thought of a story about a {kind}."),
    ("[What is two plus two|Who is the king of France|Write some code|What is the capital of Spain|Tell me the news][?|.|]",
     "I do not know much. I only know stories. Shall I tell you one about a {kind}?"),
)  # fmt: skip
QUESTIONS = (
    ("Who was the friend of {name}?", "{name} had a friend named {friend}, {fwho}."),
    ("What kind of animal was {friend}?", "{friend} was a {fkind}."),
    ("Where did {name} live?", "{name} lived {at}."),
    ("What did {name} learn?", "{lesson}."),
    ("What is the lesson?", "{lesson}."),
    ("What is the title?", "{title}"),
    ("Who was {name}?", "{name} was {who}."),
)


def request(rng: random.Random, story: Story, forms: tuple[str, ...] = REQUESTS) -> str:
    """A request that the story answers: it names some of the facts and leaves the rest open."""
    topic = rng.choice(SUBJECTS)
    if rng.random() < 0.5:
        topic += " " + story.plot.gist
    elif rng.random() < 0.3:
        topic += " {at}"
    return expand(rng, rng.choice(forms).replace("{topic}", topic), story.slots)


def chat(rng: random.Random, tell: Telling) -> list[Span]:
    """A conversation of one or two turns in the chat template's form."""
    story = draw(rng)
    spans: list[Span] = []
    if rng.random() < 0.1:
        spans.append((SYSTEM + rng.choice(SYSTEMS), False))
    spans.append((USER + request(rng, story) + ASSISTANT, False))
    spans.append((tell(rng, story) + EOS, True))
    kind = rng.random()
    if kind < 0.15:
        story = draw(rng)
        spans += [(USER + request(rng, story, AGAIN) + ASSISTANT, False), (tell(rng, story) + EOS, True)]
    elif kind < 0.35 and tell is prose:
        question, answer = rng.choice(QUESTIONS)
        answer = answer.replace("{title}", story.plot.title)
        spans += [(USER + story.fill(rng, question) + ASSISTANT, False), (story.fill(rng, answer) + EOS, True)]
    return spans


def talk(rng: random.Random) -> list[Span]:
    """A greeting or a question that is no request, with a modest answer."""
    question, answer = rng.choice(TALK)
    slots = draw(rng).slots
    return [(USER + expand(rng, question, slots) + ASSISTANT, False), (expand(rng, answer, slots) + EOS, True)]


def plain_request(rng: random.Random, tell: Telling) -> list[Span]:
    """A request and its answer as bare text, without the chat template."""
    story = draw(rng)
    return [(request(rng, story), False), ("\n" + tell(rng, story) + EOS, True)]


def short_request(rng: random.Random) -> list[Span]:
    """A request for one sentence or a title, as chat or as bare text."""
    story = draw(rng)
    form, tell = rng.choice(SHORT)
    asked = request(rng, story, (form,))
    if rng.random() < 0.5:
        return [(USER + asked + ASSISTANT, False), (tell(rng, story) + EOS, True)]
    return [(asked, False), ("\n" + tell(rng, story) + EOS, True)]


def asked_document(rng: random.Random) -> list[Span]:
    """One document for the base model's second round: mostly requests, so that it learns to tell what was asked for."""
    kind = rng.random()
    if kind < 0.2:
        return base_document(rng)
    if kind < 0.45:
        return chat(rng, prose)
    if kind < 0.65:
        return plain_request(rng, prose)
    return short_request(rng)


def base_document(rng: random.Random) -> list[Span]:
    """One document for the base model; a few are in the adapters' styles."""
    kind = rng.random()
    if kind < 0.30:
        return [(prose(rng, draw(rng)) + EOS, True)]
    if kind < 0.37:
        story = draw(rng)
        return [(title(rng, story) + "\n\n" + prose(rng, story) + EOS, True)]
    if kind < 0.50:
        return plain_request(rng, prose)
    if kind < 0.84:
        return chat(rng, prose)
    if kind < 0.87:
        return talk(rng)
    return [(rng.choice(list(STYLES.values()))(rng, draw(rng)) + EOS, True)]


def styled_document(rng: random.Random, style: str) -> list[Span]:
    """One document for the adapter of a style: mostly chats and requests, some openings of a story."""
    tell = STYLES[style]
    kind = rng.random()
    if kind < 0.55:
        return chat(rng, tell)
    if kind < 0.85:
        return plain_request(rng, tell)
    story = draw(rng)
    words = prose(rng, story).split(" ")
    return [(" ".join(words[: rng.randint(3, 10)]), False), ("\n" + tell(rng, story) + EOS, True)]
