"""Latent attention is cut by heads; the latent itself, and what makes it, is whole on every rank."""

from __future__ import annotations

from kvrun.spec import LatentAttention, LowRank
from kvrun.state.shapes import PageShape
from kvrun.weights.plan import MixerPlan, column, plan_mixer, plan_norm, row, scaled, whole_linear
from kvrun.weights.split import Split


@plan_mixer.register
def _(mixer: LatentAttention, at: str, hidden: int, split: Split) -> MixerPlan:
    heads = split.heads(mixer.heads, mixer.heads).query
    query_dim, up_dim = mixer.plain_dim + mixer.rotated_dim, mixer.plain_dim + mixer.value_dim
    remembered = mixer.latent_dim + mixer.rotated_dim
    linears = {"down": whole_linear(mixer.down, at, remembered, hidden)}
    tables = {f"norm.{key}": table for key, table in plan_norm(mixer.norm, at, mixer.latent_dim).items()}
    mine, all_heads = ((scaled(heads, query_dim),),), (mixer.heads * query_dim,)
    if isinstance(mixer.query, LowRank):
        rank = mixer.query.rank
        linears["query_down"] = whole_linear(mixer.query.down, at, rank, hidden)
        linears["query"] = column(mixer.query.up, at, mine, all_heads, rank)
        tables |= {f"query_norm.{key}": table for key, table in plan_norm(mixer.query.norm, at, rank).items()}
    else:
        linears["query"] = column(mixer.query, at, mine, all_heads, hidden)
    values = (scaled(heads, mixer.value_dim),)
    linears["out"] = row(mixer.out, at, values, hidden, mixer.heads * mixer.value_dim, split)
    up = column(mixer.up, at, ((scaled(heads, up_dim),),), (mixer.heads * up_dim,), mixer.latent_dim)
    return MixerPlan(linears, tables, PageShape(1, remembered, planes=1), folded={"up": up})
