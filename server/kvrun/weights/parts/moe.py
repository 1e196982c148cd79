"""Experts are cut by their inner units, each as a feed-forward part of its own; what chooses among them is whole on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch

from kvrun.spec import EachExpert, ExpertLayout, FlatExperts, Gated, GroupedSigmoid, Moe, StackedExperts
from kvrun.weights.plan import Alias, Cut, LinearPlan, MixerPlan, TablePlan, join, plan_mixer, scaled, whole_linear
from kvrun.weights.split import Runs, Span, Split


@dataclass(frozen=True)
class _Expert:
    """One expert, by number, and this rank's share of it."""

    number: int
    count: int
    width: int
    span: Span
    hidden: int
    first_rank: bool


@plan_mixer.register
def _(mixer: Moe, at: str, hidden: int, split: Split) -> MixerPlan:
    logits = whole_linear(mixer.logits, at, mixer.experts, hidden)
    if mixer.logits_alias is not None:
        alias = Alias(f"{join(at, mixer.logits_alias)}.weight", mixer.experts)
        logits = replace(logits, cuts=tuple(replace(cut, alias=alias) for cut in logits.cuts))
    linears, tables = {"logits": logits}, {}
    for number in range(mixer.experts):
        expert = _Expert(number, mixer.experts, mixer.width, split.units(mixer.width), hidden, split.rank == 0)
        linears[f"gate_up.{number}"], linears[f"down.{number}"] = _linears(mixer.layout, at, expert)
    if isinstance(mixer.router, GroupedSigmoid):
        tables["correction"] = TablePlan(join(at, mixer.router.correction), (mixer.experts,), ((0, mixer.experts),), exact=True)
    return MixerPlan(linears, tables)


@plan_mixer.register
def _(mixer: Gated, at: str, hidden: int, split: Split) -> MixerPlan:
    part = plan_mixer(mixer.part, at, hidden, split)
    return MixerPlan({**part.linears, "gate": whole_linear(mixer.gate, at, 1, hidden)}, part.tables)


@singledispatch
def _linears(layout: ExpertLayout, at: str, e: _Expert) -> tuple[LinearPlan, LinearPlan]:
    """An expert's gate and up as one linear, and its down."""
    raise TypeError(f"no plan for {type(layout).__name__}")


@_linears.register
def _(layout: EachExpert, at: str, e: _Expert) -> tuple[LinearPlan, LinearPlan]:
    gate, up, down = (join(at, name.format(e=e.number)) for name in (layout.gate, layout.up, layout.down))
    both, below = _aliases(layout.together, at, e)
    first, second = (None, None) if both is None else (both, replace(both, first=e.width))
    gate_up = (
        Cut(gate, (e.span,), ((0, e.hidden),), e.width, e.hidden, alias=first),
        Cut(up, (e.span,), ((0, e.hidden),), e.width, e.hidden, alias=second),
    )
    return LinearPlan("column", gate_up), LinearPlan("row", (Cut(down, ((0, e.hidden),), (e.span,), e.hidden, e.width, alias=below),))


@_linears.register
def _(layout: FlatExperts, at: str, e: _Expert) -> tuple[LinearPlan, LinearPlan]:
    total, start = e.count * e.width, e.number * e.width
    mine = ((start + e.span[0], start + e.span[1]),)
    gate, up, down = (join(at, name) for name in (layout.gate, layout.up, layout.down))
    gate_up = tuple(Cut(name, mine, ((0, e.hidden),), total, e.hidden, True, alias=Alias(name, total)) for name in (gate, up))
    # Down is laid out as the other two are, so its adapters have the experts' inputs in B and their outputs in A.
    below = Cut(down, ((0, e.hidden),), mine, e.hidden, total, True, alias=Alias(down, e.hidden), flipped=True)
    return LinearPlan("column", gate_up), LinearPlan("row", (below,), transposed=True)


@_linears.register
def _(layout: StackedExperts, at: str, e: _Expert) -> tuple[LinearPlan, LinearPlan]:
    which = (e.number, e.count)
    # Alternating rows stay as they are: the activation reads them in pairs.
    rows: Runs = (scaled(e.span, 2),) if layout.order == "alternating" else (e.span, (e.width + e.span[0], e.width + e.span[1]))
    names = join(at, layout.gate_up), join(at, layout.down)
    stated = Alias(names[0], 2 * e.width, *which), Alias(names[1], e.hidden, *which)
    both, below = stated if layout.together is None else _aliases(layout.together, at, e)
    gate_up = Cut(names[0], rows, ((0, e.hidden),), 2 * e.width, e.hidden, True, which, both)
    down = Cut(names[1], ((0, e.hidden),), (e.span,), e.hidden, e.width, True, which, below)
    return (
        LinearPlan("column", (gate_up,), layout.bias, layout.bias, layout.transposed),
        LinearPlan("row", (down,), layout.bias, layout.bias and e.first_rank, layout.transposed),
    )


def _aliases(together: str | None, at: str, e: _Expert) -> tuple[Alias | None, Alias | None]:
    if together is None:
        return None, None
    owner = join(at, together)
    return Alias(f"{owner}.gate_up_proj", 2 * e.width, e.number, e.count), Alias(f"{owner}.down_proj", e.hidden, e.number, e.count)
