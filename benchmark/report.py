"""Results of scenarios as files of JSON, and those files as a page of tables. Pure but for the folder it is given."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scenarios import Claim, Scenario, Share

READ_SHARE, MATMUL_SHARE = "share of the read rate", "share of the best matmul"


@dataclass
class Line:
    """One row's figures, a number for each turn."""

    server: str
    peer: str
    case: str
    bytes: float | None = None
    flops: float | None = None
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def middle(self, figure: str) -> float:
        """The median over the turns; not a number where it was not measured."""
        values = [v for v in self.figures.get(figure, []) if not math.isnan(v)]
        return statistics.median(values) if values else float("nan")


@dataclass
class Result:
    """One scenario as it was measured."""

    name: str
    shape: str
    machine: str
    state: str
    """Which state of the code, as `git describe` tells."""
    limits: dict[str, list[float]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def save(self, folder: Path) -> None:
        (folder / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Result:
        said = json.loads(path.read_text())
        return cls(**said | {"lines": [Line(**line) for line in said["lines"]]})

    def limit(self, name: str) -> float:
        return statistics.median(self.limits[name])

    def best_matmul(self) -> float:
        return max(statistics.median(values) for name, values in self.limits.items() if name != "read")

    def shares(self) -> None:
        """Add to each line what share of the machine's limit it reached."""
        for line in self.lines:
            if line.bytes and self.limits:
                line.figures[READ_SHARE] = [line.bytes / (ms / 1e3) / self.limit("read") for ms in line.figures["ms between tokens"]]
            if line.flops and self.limits:
                line.figures[MATMUL_SHARE] = [rate * line.flops / self.best_matmul() for rate in line.figures["prompt tokens/s"]]


def number(value: float, figure: str) -> str:
    if math.isnan(value):
        return "–"
    if figure.startswith("share"):
        return f"{value:.0%}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.1f}"


def cell(line: Line, figure: str) -> str:
    """The median, and least and most where there is more than one."""
    values = [v for v in line.figures.get(figure, []) if not math.isnan(v)]
    if not values:
        return ""
    spread = f" ({number(min(values), figure)} to {number(max(values), figure)})" if len(values) > 1 else ""
    return number(line.middle(figure), figure) + spread


def claimed(claim: Claim | Share, result: Result) -> list[str]:
    """What was reached of a claim, as sentences; none where a row it needs was not measured."""
    ours = [line for line in result.lines if line.peer == "kv.run"]
    if isinstance(claim, Share):
        return [
            f"{line.server}, {claim.figure}: {line.middle(claim.figure):.0%} (wanted: {claim.least:.0%})"
            for line in ours
            if claim.figure in line.figures
        ]
    mine = next((line for line in ours if line.case == claim.case), None)
    if mine is None:
        return []
    if claim.against:
        beside, name = mine, claim.against
        other = mine.middle(claim.against)
    else:
        wanted = claim.beside or claim.case
        rows = [line for line in result.lines if line.case == wanted and line is not mine and not math.isnan(line.middle(claim.figure))]
        others = [line for line in rows if (line.peer == "kv.run") == bool(claim.beside)]
        if not others:
            return []
        beside = (min if claim.less else max)(others, key=lambda line: line.middle(claim.figure))
        name, other = f"{beside.server}, {beside.case}", beside.middle(claim.figure)
    ratio = mine.middle(claim.figure) / other
    bound = "at most" if claim.less else "at least"
    return [f"{mine.server}, {mine.case}, {claim.figure}: {ratio:.2f} × {name} (wanted: {bound} {claim.ratio:g})"]


def section(scenario: Scenario, result: Result) -> str:
    """One scenario's table, what was claimed of it, and what it was measured on."""
    result.shares()
    names = list(dict.fromkeys(name for line in result.lines for name in line.figures if name != "client"))
    rows = [["", "", *names], ["---"] * (len(names) + 2)]
    rows += [[line.server, line.case, *(cell(line, name) for name in names)] for line in result.lines]
    turns = max((len(v) for line in result.lines for v in line.figures.values()), default=0)
    facts = [f"`{result.shape}` shape, medians of {turns} turn{'s' if turns != 1 else ''}, state {result.state}"]
    if result.limits:
        facts.append(f"read rate {result.limit('read') / 1e9:.1f} GB/s, best matmul {result.best_matmul() / 1e9:.0f} GFLOP/s")
    if spent := [v for line in result.lines for v in line.figures.get("client", [])]:
        facts.append(f"the client took at most {max(spent):.1%} of a core")
    text = [f"### {scenario.name}", scenario.title, "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    text += [f"- {sentence}" for claim in scenario.claims for sentence in claimed(claim, result)]
    text += [f"- Not measured: {why}" for why in result.missing]
    return "\n".join([*text, "", "; ".join(facts) + ".", ""])


def page(scenarios: list[Scenario], folder: Path) -> str:
    """All results of a folder, in the order of the scenarios."""
    found = [(s, Result.load(folder / f"{s.name}.json")) for s in scenarios if (folder / f"{s.name}.json").exists()]
    machines = dict.fromkeys(result.machine for _, result in found)
    return "\n".join([*machines, "", *(section(scenario, result) for scenario, result in found)])
