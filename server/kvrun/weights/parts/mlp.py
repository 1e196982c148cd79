"""Feed-forward parts are cut by their inner units."""

from __future__ import annotations

from kvrun.spec import GatedMlp, Mlp
from kvrun.weights.plan import MixerPlan, column, plan_mixer, row
from kvrun.weights.split import Split


@plan_mixer.register
def _(mixer: GatedMlp, at: str, hidden: int, split: Split) -> MixerPlan:
    span, width = split.units(mixer.width), mixer.width
    gate_up = column(mixer.gate_up, at, ((span,), (span,)), (width, width), hidden)
    return MixerPlan({"gate_up": gate_up, "down": row(mixer.down, at, (span,), hidden, width, split)})


@plan_mixer.register
def _(mixer: Mlp, at: str, hidden: int, split: Split) -> MixerPlan:
    span, width = split.units(mixer.width), mixer.width
    up = column(mixer.up, at, ((span,),), (width,), hidden)
    return MixerPlan({"up": up, "down": row(mixer.down, at, (span,), hidden, width, split)})
