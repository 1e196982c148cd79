"""The plots: what goes wrong, who helps, and how it ends. One text file in plots/ for each.

A template may hold [this|that] choices and {slots}; stories.py fills both. Slots of the hero: name, kind, who, he, him,
his, He, His. Of the friend: friend, fkind, fwho, fhe, fhim, fhis. Of the world: at, spot, spot2, spot3, thing, treat,
time. An `option` is a set of slots that are drawn together, so that a cause always meets its effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "plots"
NAMES = (
    "lost fear share rescue build mistake seed birthday race noise newcomer rain gift learn wish kindness"  # The order is part of the seed.
)


@dataclass(frozen=True)
class Plot:
    """One plot: a chain of cause and effect that any hero, friend and place can live through."""

    title: str
    gist: str  # follows the hero in a request: "a fox who lost his red kite"
    problem: str  # a clause in the past tense, without a full stop
    turn: str  # how it is solved, likewise
    lesson: str
    options: tuple[dict[str, str], ...]
    beats: tuple[str, ...]
    verses: tuple[str, ...]  # each four lines in two rhymed couplets


def read(path: Path) -> Plot:
    """Read one plot file: lines of `key: value`, where option, beat and verse may come many times."""
    lines = [line.split(": ", 1) for line in path.read_text().splitlines() if line]
    only = {key: value for key, value in lines if key not in ("option", "beat", "verse")}
    options = [value for key, value in lines if key == "option"]
    return Plot(
        **only,
        options=tuple(dict(pair.split(" = ") for pair in option.split("; ")) for option in options) or ({},),
        beats=tuple(value for key, value in lines if key == "beat"),
        verses=tuple(value.replace(" / ", "\n") for key, value in lines if key == "verse"),
    )


PLOTS = tuple(read(FOLDER / f"{name}.txt") for name in NAMES.split())
