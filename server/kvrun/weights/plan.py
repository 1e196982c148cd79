"""The one place that knows which rows and columns of which checkpoint tensors a rank's matrices are made of.

Formats, biases and adapters are all cut by these plans. Pure: reads no file, imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Literal

from kvrun.spec import Embed, Fused, Gate, Head, Layer, Mixer, Model, Norm, Packed, Parallel, RmsNorm, Step, Stored
from kvrun.state.shapes import PageLayers, PageShape, PageUse, SlotShape
from kvrun.weights.split import Runs, Span, Split, merge, size

# Both ends are as wide as the vocabulary and split by its rows.
Role = Literal["column", "row", "whole", "embedding", "head"]


@dataclass(frozen=True)
class Alias:
    """A parameter's name under which adapters know a module too, as the rows from `first` of one of `count` matrices."""

    parameter: str  # "model.layers.3.mlp.experts.gate_up_proj"
    out_features: int  # of each matrix
    index: int = 0
    count: int = 1
    first: int = 0


@dataclass(frozen=True)
class Cut:
    """Rows and columns of one checkpoint module, counted in out x in whichever way it is stored."""

    module: str
    rows: Runs
    cols: Runs
    out_features: int  # of the whole module
    in_features: int  # of the whole module
    bare: bool = False  # its tensors are called after it, "w" and "w_bias", not "w.weight" and "w.bias"
    index: tuple[int, int] | None = None  # which of how many, where a first axis of its tensors runs over modules of one shape
    alias: Alias | None = None
    flipped: bool = False  # an adapter's A has its outputs, and B its inputs

    def tensor(self, suffix: str) -> str:
        """The name of one of its tensors."""
        if not self.bare:
            return f"{self.module}.{suffix}"
        return self.module if suffix == "weight" else f"{self.module}_{suffix}"

    def stacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of it that would be `shape` if it were the only one."""
        return shape if self.index is None else (self.index[1], *shape)


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
    exact: bool = False  # held in float32, whatever the model's own type
    rest: tuple[str, int] | None = None  # a tensor that has the last rows, and how many

    @property
    def elements(self) -> int:
        """Numbers this rank holds of it."""
        return size(self.rows) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class MixerPlan:
    """What one mixer holds on this rank, by the names its module knows it by, and what it remembers of a sequence."""

    linears: Mapping[str, LinearPlan] = field(default_factory=dict)
    tables: Mapping[str, TablePlan] = field(default_factory=dict)
    pages: PageShape | None = None
    page_use: PageUse = PageUse.SEQUENCE
    slots: tuple[SlotShape, ...] = ()
    folded: Mapping[str, LinearPlan] = field(default_factory=dict)  # matrices that the module takes apart and makes others of


@dataclass(frozen=True)
class EmbedPlan:
    """This rank's rows of the embedding, and what every rank holds of what follows it."""

    table: TablePlan
    position: TablePlan | None
    norm: Mapping[str, TablePlan]
    project: LinearPlan | None


@dataclass(frozen=True)
class HeadPlan:
    """The output matrix: its rows over the vocabulary, or the embedding's when tied and absent."""

    weight: TablePlan
    bias: TablePlan | None
    norm: Mapping[str, TablePlan]
    project: LinearPlan | None


@dataclass
class ModelPlan:
    """Every tensor a rank needs, by the spec part that asked for it."""

    split: Split
    embed: EmbedPlan
    head: HeadPlan
    tables: list[TablePlan] = field(default_factory=list)  # of the layers
    linears: list[LinearPlan] = field(default_factory=list)  # of the layers
    pages: list[PageShape] = field(default_factory=list)  # one per layer of the page pool
    slots: list[SlotShape] = field(default_factory=list)  # one per array of a recurrent state

    @property
    def elements(self) -> int:
        """Numbers this rank holds, a tied vocabulary counted once."""
        matrices = sum(linear.out_features * (linear.in_features + linear.bias_here) for linear in self.all_linears())
        tied = self.head.weight.instead == self.embed.table.tensor
        return matrices + sum(table.elements for table in self.all_tables()) - self.embed.table.elements * tied

    def all_tables(self) -> Iterator[TablePlan]:
        """Tables of every kind."""
        ends = (self.embed.table, self.embed.position, *self.embed.norm.values())
        ends += (self.head.weight, self.head.bias, *self.head.norm.values())
        yield from (table for table in ends if table is not None)
        yield from self.tables

    def all_linears(self) -> Iterator[LinearPlan]:
        """Linears of every kind."""
        yield from (linear for linear in (self.embed.project, self.head.project) if linear is not None)
        yield from self.linears


def plan_model(model: Model, split: Split) -> ModelPlan:
    """Plan a rank's share of a model."""
    embed, head = model.decoder.embed, model.decoder.head
    plan, pool = ModelPlan(split, plan_embed(embed, head, split), plan_head(head, embed, split)), PageLayers()
    for layer in layers(model):
        for step in layer.steps:
            for norm in norms(step):
                plan.tables += plan_norm(norm, layer.at, embed.hidden).values()
            for mixer in mixers(step):
                part = plan_mixer(mixer, layer.at, embed.hidden, split)
                plan.linears += (*part.linears.values(), *part.folded.values())
                plan.tables += part.tables.values()
                plan.slots += part.slots
                if part.pages is not None:
                    pool.take(part.pages, part.page_use)
    if model.encoder is not None:
        plan.tables += plan_norm(model.encoder.norm, "", embed.hidden).values()
    if model.images is not None:
        sight = plan_images(model.images, embed.hidden)
        plan.linears += sight.linears.values()
        plan.tables += sight.tables.values()
    # Layers may share a table, a learned bias of positions for one.
    plan.tables, plan.pages = list(dict.fromkeys(plan.tables)), pool.shapes
    return plan


def layers(model: Model) -> Iterator[Layer]:
    """Every layer, the decoder's first."""
    yield from model.decoder.layers
    if model.encoder is not None:
        yield from model.encoder.layers


@singledispatch
def plan_mixer(mixer: Mixer, at: str, hidden: int, split: Split) -> MixerPlan:
    """This rank's share of a mixer whose names are relative to `at`. Every kind registers its own in `parts/`."""
    raise TypeError(f"no plan for a {type(mixer).__name__}")


@singledispatch
def plan_images(images: object, hidden: int) -> MixerPlan:
    """What this rank holds to make an image's features, as wide as the decoder's rows. Registered in `parts/`."""
    raise TypeError(f"no plan for a {type(images).__name__}")


def norms(step: Step) -> list[Norm | Gate]:
    """The norms of a step, in the order in which they are used."""
    if isinstance(step, Parallel):
        return [norm for residual in step.residuals for norm in norms(residual)]
    after = None if not hasattr(step, "after") else step.after
    return [norm for norm in (step.norm, after) if norm is not None]


def mixers(step: Step) -> list[Mixer]:
    """The mixers of a step, in order."""
    if isinstance(step, Parallel):
        return [mixer for residual in step.residuals for mixer in residual.mixers]
    return list(step.mixers)


def first_norm(layer: Layer) -> Norm | Gate | None:
    """The first norm of a layer, if it has one."""
    return next((norm for step in layer.steps for norm in norms(step)), None)


def plan_embed(embed: Embed, head: Head, split: Split) -> EmbedPlan:
    """The table's rows split over the ranks, everything after it whole on each."""
    width = embed.width or embed.hidden
    other = f"{head.name}.weight" if head.tied else None
    table = TablePlan(f"{embed.name}.weight", (embed.vocabulary, width), (split.span(embed.vocabulary),), other, rest=_rest(embed))
    learned = embed.position
    position = None if learned is None else whole(f"{learned.name}.weight", (learned.rows, embed.hidden))
    norm = {} if embed.norm is None else plan_norm(embed.norm, "", embed.hidden)
    return EmbedPlan(table, position, norm, None if embed.project is None else whole_linear(embed.project, "", embed.hidden, width))


def plan_head(head: Head, embed: Embed, split: Split) -> HeadPlan:
    """The matrix's rows split over the ranks, everything before it whole on each."""
    rows, width = (split.span(embed.vocabulary),), embed.width or embed.hidden
    other = f"{embed.name}.weight" if head.tied else None
    weight = TablePlan(f"{head.name}.weight", (embed.vocabulary, width), rows, other, rest=_rest(head))
    bias = TablePlan(f"{head.name}.bias", (embed.vocabulary,), rows) if head.bias else None
    norm = {} if head.norm is None else plan_norm(head.norm, "", embed.hidden)
    return HeadPlan(weight, bias, norm, None if head.project is None else whole_linear(head.project, "", width, embed.hidden))


def _rest(end: Embed | Head) -> tuple[str, int] | None:
    return None if end.rest is None else (f"{end.rest.name}.weight", end.rest.rows)


def plan_norm(norm: Norm | Gate, at: str, width: int) -> dict[str, TablePlan]:
    """The vectors of a norm, whole on every rank: "weight", "bias" or both."""
    if isinstance(norm, Gate):
        return {"weight": whole(join(at, norm.name), norm.shape)}
    return {key: whole(f"{join(at, norm.name)}.{key}", (width,)) for key in vectors(norm)}


def vectors(norm: Norm) -> list[str]:
    """Which vectors a checkpoint stores for a norm."""
    stored = {"weight": True, "bias": False} if isinstance(norm, RmsNorm) else {"weight": norm.weight, "bias": norm.bias}
    return [key for key, there in stored.items() if there]


def whole(tensor: str, shape: tuple[int, ...]) -> TablePlan:
    """A tensor that every rank holds in full."""
    return TablePlan(tensor, shape, ((0, shape[0]),))


def whole_linear(stored: Fused, at: str, out: int, width: int) -> LinearPlan:
    """A linear that every rank holds in full, from `width` inputs to `out` outputs."""
    (name,) = stored.names
    cut = Cut(join(at, name), ((0, out),), ((0, width),), out, width)
    return LinearPlan("whole", (cut,), stored.bias, stored.bias, stored.transposed)


def column(stored: Stored, at: str, parts: tuple[Runs, ...], widths: tuple[int, ...], hidden: int) -> LinearPlan:
    """Output rows split: `parts` are this rank's rows within each part, `widths` the parts' whole sizes."""
    cols = ((0, hidden),)
    names = (stored.name,) if isinstance(stored, Packed) else stored.names
    held = (len(parts),) if isinstance(stored, Packed) else stored.parts or (1,) * len(names)
    cuts, first = [], 0
    for name, count in zip(names, held, strict=True):
        mine, sizes = parts[first : first + count], widths[first : first + count]
        offsets = [sum(sizes[:i]) for i in range(count)]
        runs = merge((offset + a, offset + b) for offset, part in zip(offsets, mine, strict=True) for a, b in part)
        cuts.append(Cut(join(at, name), runs, cols, sum(sizes), hidden))
        first += count
    return LinearPlan("column", tuple(cuts), stored.bias, stored.bias, stored.transposed)


def row(stored: Stored, at: str, cols: Runs, out: int, width: int, split: Split) -> LinearPlan:
    """Input columns split: each rank makes a partial sum, and the whole bias counts on rank 0 only."""
    (name,) = (stored.name,) if isinstance(stored, Packed) else stored.names
    cut = Cut(join(at, name), ((0, out),), cols, out, width)
    return LinearPlan("row", (cut,), stored.bias, stored.bias and split.rank == 0, stored.transposed)


def scaled(span: Span, by: int) -> Span:
    """A span of units as a span of the `by` numbers in each."""
    return span[0] * by, span[1] * by


def join(at: str, name: str) -> str:
    """A part's full name within the model."""
    return f"{at}.{name}" if at else name
