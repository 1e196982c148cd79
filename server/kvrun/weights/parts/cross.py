"""The encoder's attention is cut as any attention, and what the decoder looks at likewise by heads."""

from __future__ import annotations

from dataclasses import replace

from kvrun.spec import Attention, CrossAttention, SourceAttention
from kvrun.state.shapes import PageShape, PageUse
from kvrun.weights.plan import MixerPlan, column, plan_mixer, row, scaled
from kvrun.weights.split import Split


@plan_mixer.register
def _(mixer: SourceAttention, at: str, hidden: int, split: Split) -> MixerPlan:
    plan: MixerPlan = plan_mixer.dispatch(Attention)(mixer, at, hidden, split)
    return replace(plan, page_use=PageUse.READING)


@plan_mixer.register
def _(mixer: CrossAttention, at: str, hidden: int, split: Split) -> MixerPlan:
    share, dim = split.heads(mixer.heads, mixer.kv_heads), mixer.head_dim
    query, kv = scaled(share.query, dim), scaled(share.kv, dim)
    width, kv_width = mixer.heads * dim, mixer.kv_heads * dim
    linears = {
        "query": column(mixer.query, at, ((query,),), (width,), hidden),
        "key_value": column(mixer.key_value, at, ((kv,), (kv,)), (kv_width, kv_width), hidden),
        "out": row(mixer.out, at, (query,), hidden, width, split),
    }
    return MixerPlan(linears, pages=PageShape(share.kv_heads, dim), page_use=PageUse.MEMORY)
