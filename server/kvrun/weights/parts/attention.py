"""Attention is cut by heads, in whole groups of the query heads that share a key/value head as far as the ranks allow."""

from __future__ import annotations

from kvrun.spec import Attention, EachHeadNorm, HeadNorm, Packed, QueryKeyNorm, RelativeBias
from kvrun.state.shapes import PageShape
from kvrun.weights.plan import Cut, LinearPlan, MixerPlan, TablePlan, column, join, plan_mixer, row, scaled, vectors, whole
from kvrun.weights.split import HeadShare, Span, Split, merge

SEPARATE = "{head}"  # in the name of a norm that is stored as a tensor for each head


@plan_mixer.register
def _(mixer: Attention, at: str, hidden: int, split: Split) -> MixerPlan:
    share, dim = split.heads(mixer.heads, mixer.kv_heads), mixer.head_dim
    out = row(mixer.out, at, (scaled(share.query, dim),), hidden, mixer.heads * dim, split)
    tables = {} if mixer.norm is None else _norm_tables(mixer, mixer.norm, share, at)
    if mixer.sinks is not None:
        tables["sinks"] = TablePlan(join(at, mixer.sinks), (mixer.heads,), (share.query,))
    if isinstance(mixer.position, RelativeBias):
        tables["relative"] = whole(f"{mixer.position.name}.weight", (mixer.position.buckets, mixer.heads))
    return MixerPlan({"qkv": _qkv(mixer, share, at, hidden), "out": out}, tables, PageShape(share.kv_heads, dim))


def _qkv(mixer: Attention, share: HeadShare, at: str, hidden: int) -> LinearPlan:
    dim, group = mixer.head_dim, mixer.heads // mixer.kv_heads
    if isinstance(mixer.qkv, Packed) and mixer.qkv.order == "per_group":
        # Group k lies at k * (group + 2) heads: its query heads, its key, its value.
        first = [(head // group) * (group + 2) + head % group for head in range(*share.query)]
        key = [kv * (group + 2) + group for kv in range(*share.kv)]
        rows = [head * dim for head in (*first, *key, *(k + 1 for k in key))]
        runs = merge((row, row + dim) for row in rows)
        total = (mixer.heads + 2 * mixer.kv_heads) * dim
        cut = Cut(join(at, mixer.qkv.name), runs, ((0, hidden),), total, hidden)
        return LinearPlan("column", (cut,), mixer.qkv.bias, mixer.qkv.bias, mixer.qkv.transposed)
    kv = scaled(share.kv, dim)
    widths = (mixer.heads * dim, mixer.kv_heads * dim, mixer.kv_heads * dim)
    return column(mixer.qkv, at, ((scaled(share.query, dim),), (kv,), (kv,)), widths, hidden)


def _norm_tables(mixer: Attention, norm: QueryKeyNorm, share: HeadShare, at: str) -> dict[str, TablePlan]:
    sides = (("query", norm.query, mixer.heads, share.query), ("key", norm.key, mixer.kv_heads, share.kv))
    tables: dict[str, TablePlan] = {}
    for side, part, heads, held in sides:
        for vector in vectors(part):
            tensor = f"{join(at, part.name)}.{vector}"
            if SEPARATE in tensor:  # all of them on every rank: they are small, and the whole checkpoint is accounted for
                each = (tensor.replace(SEPARATE, str(head)) for head in range(heads))
                tables |= {f"{side}.{vector}.{head}": whole(name, (mixer.head_dim,)) for head, name in enumerate(each)}
            else:
                tables[f"{side}.{vector}"] = _norm_table(norm, tensor, heads, held, mixer.head_dim)
    return tables


def _norm_table(norm: QueryKeyNorm, tensor: str, heads: int, held: Span, dim: int) -> TablePlan:
    if isinstance(norm, HeadNorm):
        return whole(tensor, (dim,))
    if isinstance(norm, EachHeadNorm):
        return TablePlan(tensor, (heads, dim), (held,))
    return TablePlan(tensor, (heads * dim,), (scaled(held, dim),))
