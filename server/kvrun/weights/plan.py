"""The one place that knows which rows and columns of which checkpoint tensors a rank's matrices are made of.

Formats, biases and adapters are all cut by these plans. Pure: reads no file, imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Literal

from kvrun.spec import Attention, GatedMlp, Head, Layer, LayerNorm, Mixer, Mlp, Model, Norm, Packed, Parallel, RmsNorm, Step, Stored
from kvrun.weights.split import HeadShare, Runs, Span, Split, merge, size

Role = Literal["column", "row", "whole"]


@dataclass(frozen=True)
class Cut:
    """Rows and columns of one checkpoint module, counted in out x in whichever way it is stored."""

    module: str
    rows: Runs
    cols: Runs
    out_features: int  # of the whole module
    in_features: int  # of the whole module


@dataclass(frozen=True)
class LinearPlan:
    """A linear of this rank: the rows of its cuts below each other, all with the same columns."""

    role: Role
    cuts: tuple[Cut, ...]
    bias: bool = False  # the checkpoint has one
    bias_here: bool = False  # and this rank adds it
    transposed: bool = False  # stored in x out

    @property
    def out_features(self) -> int:
        """Outputs of this rank."""
        return sum(size(cut.rows) for cut in self.cuts)

    @property
    def in_features(self) -> int:
        """Inputs of this rank."""
        return size(self.cuts[0].cols)


@dataclass(frozen=True)
class TablePlan:
    """A tensor that is not a linear: a norm's vector or an embedding table, of which this rank holds `rows`."""

    tensor: str
    shape: tuple[int, ...]
    rows: Runs
    instead: str | None = None  # the tensor to read when the checkpoint lacks this one: the other of two tied names

    @property
    def elements(self) -> int:
        """Numbers this rank holds of it."""
        return size(self.rows) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class HeadPlan:
    """The output matrix: its rows over the vocabulary, or the embedding's when tied and absent."""

    weight: TablePlan
    bias: TablePlan | None


@dataclass
class ModelPlan:
    """Every tensor a rank needs, by the spec part that asked for it."""

    split: Split
    embed: TablePlan
    head: HeadPlan
    tables: list[TablePlan] = field(default_factory=list)  # norms and learned positions, whole on every rank
    linears: list[LinearPlan] = field(default_factory=list)

    @property
    def elements(self) -> int:
        """Numbers this rank holds, a tied vocabulary counted once."""
        matrices = sum(linear.out_features * (linear.in_features + linear.bias_here) for linear in self.linears)
        tied = self.head.weight.instead == self.embed.tensor
        return matrices + sum(table.elements for table in self.all_tables()) - self.embed.elements * tied

    def all_tables(self) -> Iterator[TablePlan]:
        """Tables of every kind."""
        yield from (self.embed, self.head.weight, *([self.head.bias] if self.head.bias else []), *self.tables)


def plan_model(model: Model, split: Split) -> ModelPlan:
    """Plan a rank's share of a model."""
    embed, head, hidden = model.decoder.embed, model.decoder.head, model.decoder.embed.hidden
    plan = ModelPlan(split, plan_embed(model, split), plan_head(head, model, split))
    if embed.position is not None:
        plan.tables.append(whole(f"{embed.position.name}.weight", (embed.position.rows, hidden)))
    plan.tables += plan_norm(head.norm, "", hidden).values()
    for layer in model.decoder.layers:
        for norm, mixers in branches(layer):
            plan.tables += plan_norm(norm, layer.at, hidden).values()
            for mixer in mixers:
                plan.linears += plan_mixer(mixer, layer.at, hidden, split).values()
    return plan


def branches(layer: Layer) -> Iterator[tuple[Norm, tuple[Mixer, ...]]]:
    """Each norm of a layer with the mixers that read it, in order."""
    for step in layer.steps:
        yield from step_branches(step)


def step_branches(step: Step) -> list[tuple[Norm, tuple[Mixer, ...]]]:
    """Each norm of a step with the mixers that read it."""
    residuals = step.residuals if isinstance(step, Parallel) else (step,)
    return [(residual.norm, residual.mixers) for residual in residuals]


def whole(tensor: str, shape: tuple[int, ...]) -> TablePlan:
    """A tensor that every rank holds in full."""
    return TablePlan(tensor, shape, ((0, shape[0]),))


def plan_embed(model: Model, split: Split) -> TablePlan:
    """This rank's rows of the embedding."""
    embed, head = model.decoder.embed, model.decoder.head
    other = f"{head.name}.weight" if head.tied else None
    return TablePlan(f"{embed.name}.weight", (embed.vocabulary, embed.hidden), (split.span(embed.vocabulary),), other)


def plan_head(head: Head, model: Model, split: Split) -> HeadPlan:
    """This rank's rows of the output matrix."""
    embed = model.decoder.embed
    rows = (split.span(embed.vocabulary),)
    other = f"{embed.name}.weight" if head.tied else None
    weight = TablePlan(f"{head.name}.weight", (embed.vocabulary, embed.hidden), rows, other)
    return HeadPlan(weight, TablePlan(f"{head.name}.bias", (embed.vocabulary,), rows) if head.bias else None)


def plan_norm(norm: Norm, at: str, hidden: int) -> dict[str, TablePlan]:
    """The vectors of a norm: "weight", "bias" or both."""
    name = join(at, norm.name)
    stored = {"weight": True, "bias": False} if isinstance(norm, RmsNorm) else _layer_norm_vectors(norm)
    return {key: whole(f"{name}.{key}", (hidden,)) for key, there in stored.items() if there}


def _layer_norm_vectors(norm: LayerNorm) -> dict[str, bool]:
    return {"weight": norm.weight, "bias": norm.bias}


@singledispatch
def plan_mixer(mixer: Mixer, at: str, hidden: int, split: Split) -> dict[str, LinearPlan]:
    """The linears of a mixer by the name of the field that stores them."""
    raise TypeError(f"no plan for a {type(mixer).__name__}")


@plan_mixer.register
def _(mixer: Attention, at: str, hidden: int, split: Split) -> dict[str, LinearPlan]:
    share = split.heads(mixer.heads, mixer.kv_heads)
    cols = _scaled(share.query, mixer.head_dim)
    width = mixer.heads * mixer.head_dim
    return {"qkv": _qkv(mixer, share, at, hidden), "out": _row(mixer.out, at, (cols,), hidden, width, split)}


@plan_mixer.register
def _(mixer: GatedMlp, at: str, hidden: int, split: Split) -> dict[str, LinearPlan]:
    span, width = split.span(mixer.width), mixer.width
    gate_up = _column(mixer.gate_up, at, ((span,), (span,)), (width, width), hidden)
    return {"gate_up": gate_up, "down": _row(mixer.down, at, (span,), hidden, width, split)}


@plan_mixer.register
def _(mixer: Mlp, at: str, hidden: int, split: Split) -> dict[str, LinearPlan]:
    span, width = split.span(mixer.width), mixer.width
    up = _column(mixer.up, at, ((span,),), (width,), hidden)
    return {"up": up, "down": _row(mixer.down, at, (span,), hidden, width, split)}


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
    kv = _scaled(share.kv, dim)
    widths = (mixer.heads * dim, mixer.kv_heads * dim, mixer.kv_heads * dim)
    return _column(mixer.qkv, at, ((_scaled(share.query, dim),), (kv,), (kv,)), widths, hidden)


def _column(stored: Stored, at: str, parts: tuple[Runs, ...], widths: tuple[int, ...], hidden: int) -> LinearPlan:
    """Output rows split: `parts` are this rank's rows within each part, `widths` the parts' whole sizes."""
    cols = ((0, hidden),)
    if isinstance(stored, Packed):
        offsets = [sum(widths[:i]) for i in range(len(widths))]
        runs = merge((offset + a, offset + b) for offset, part in zip(offsets, parts, strict=True) for a, b in part)
        cuts: tuple[Cut, ...] = (Cut(join(at, stored.name), runs, cols, sum(widths), hidden),)
    else:
        modules = zip(stored.names, parts, widths, strict=True)
        cuts = tuple(Cut(join(at, name), part, cols, width, hidden) for name, part, width in modules)
    return LinearPlan("column", cuts, stored.bias, stored.bias, stored.transposed)


def _row(stored: Stored, at: str, cols: Runs, out: int, width: int, split: Split) -> LinearPlan:
    """Input columns split: each rank makes a partial sum, and the whole bias counts on rank 0 only."""
    (name,) = (stored.name,) if isinstance(stored, Packed) else stored.names
    cut = Cut(join(at, name), ((0, out),), cols, out, width)
    return LinearPlan("row", (cut,), stored.bias, stored.bias and split.rank == 0, stored.transposed)


def _scaled(span: Span, by: int) -> Span:
    return span[0] * by, span[1] * by


def join(at: str, name: str) -> str:
    """A part's full name within the model."""
    return f"{at}.{name}" if at else name
