"""Recurrent mixers are cut by channels or by heads; what is chosen from all channels is summed within the mixer."""

from __future__ import annotations

from kvrun.spec import Mamba, Mamba2
from kvrun.spec.recurrent import Convolution
from kvrun.state.shapes import SlotShape
from kvrun.weights.plan import LinearPlan, MixerPlan, TablePlan, column, join, plan_mixer, row, scaled
from kvrun.weights.split import Runs, Span, Split, merge, size


@plan_mixer.register
def _(mixer: Mamba, at: str, hidden: int, split: Split) -> MixerPlan:
    held: Runs = (split.span(mixer.channels),)
    channels, chosen = mixer.channels, mixer.rank + 2 * mixer.size
    linears = {
        "project": column(mixer.project, at, (held, held), (channels, channels), hidden),
        "select": row(mixer.select, at, held, chosen, channels, split),
        "step": column(mixer.step, at, (held,), (channels,), mixer.rank),
        "out": row(mixer.out, at, held, hidden, channels, split),
    }
    tables = _convolution(mixer.conv, at, channels, held) | {
        "step_bias": TablePlan(f"{join(at, mixer.step.names[0])}.bias", (channels,), held, exact=True),
        "decay": TablePlan(join(at, mixer.decay), (channels, mixer.size), held, exact=True),
        "skip": TablePlan(join(at, mixer.skip), (channels,), held, exact=True),
    }
    slots = SlotShape((size(held), mixer.conv.taps - 1)), SlotShape((size(held), mixer.size), wide=True)
    return MixerPlan(linears, tables, slots=slots)


@plan_mixer.register
def _(mixer: Mamba2, at: str, hidden: int, split: Split) -> MixerPlan:
    # A group's input and output are to its heads what a key/value head is to its query heads.
    share = split.heads(mixer.heads, mixer.groups)
    inner, chosen = mixer.heads * mixer.head_dim, mixer.groups * mixer.size
    mine, groups = scaled(share.query, mixer.head_dim), scaled(share.kv, mixer.size)
    widths = (inner, inner, chosen, chosen, mixer.heads)
    parts = ((mine,), (mine,), (groups,), (groups,), (share.query,))
    convolved = merge((mine, _moved(groups, inner), _moved(groups, inner + chosen)))
    heads: Runs = (share.query,)
    tables = _convolution(mixer.conv, at, inner + 2 * chosen, convolved) | {
        "step_bias": TablePlan(join(at, mixer.step_bias), (mixer.heads,), heads, exact=True),
        "decay": TablePlan(join(at, mixer.decay), (mixer.heads,), heads, exact=True),
        "skip": TablePlan(join(at, mixer.skip), (mixer.heads,), heads, exact=True),
        "norm": TablePlan(f"{join(at, mixer.norm)}.weight", (inner,), (mine,)),
    }
    linears: dict[str, LinearPlan] = {
        "project": column(mixer.project, at, parts, widths, hidden),
        "out": row(mixer.out, at, (mine,), hidden, inner, split),
    }
    state = SlotShape((share.heads, mixer.head_dim, mixer.size), wide=True)
    return MixerPlan(linears, tables, slots=(SlotShape((size(convolved), mixer.conv.taps - 1)), state))


def _convolution(conv: Convolution, at: str, channels: int, held: Runs) -> dict[str, TablePlan]:
    weight = {"taps": TablePlan(f"{join(at, conv.name)}.weight", (channels, 1, conv.taps), held)}
    return weight | ({"taps_bias": TablePlan(f"{join(at, conv.name)}.bias", (channels,), held)} if conv.bias else {})


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by
