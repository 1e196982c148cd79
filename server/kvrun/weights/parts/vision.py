"""How a model sees is whole on every rank: it runs once per image, and is small beside the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import singledispatch

from kvrun.spec import Feed, GatedMlp, HeadNorm, Images, Layer, LookAt, Matrix, Normalise, Patches, Perceive, Resample, Tiles
from kvrun.state.shapes import PageShape, PageUse
from kvrun.weights.plan import MixerPlan, TablePlan, column, mixers, norms, plan_images, plan_mixer, plan_norm, row, scaled, whole
from kvrun.weights.split import Split

WHOLE = Split()


@plan_images.register
def _(images: Images, hidden: int) -> MixerPlan:
    """Everything, numbered in the order in which an image passes through it."""
    parts = [
        *_encoder(images),
        *(part for stage in images.stages for part in _stage(stage)),
        MixerPlan(tables=plan_joining(images, hidden)),
    ]
    linears = [replace(linear, role="whole") for part in parts for linear in part.linears.values()]
    tables: list[TablePlan] = [table for part in parts for table in part.tables.values()]
    return MixerPlan({str(i): linear for i, linear in enumerate(linears)}, {str(i): table for i, table in enumerate(tables)})


def plan_patches(patches: Patches) -> dict[str, TablePlan]:
    """ "weight", "positions", and "bias" and "first" where there are such"""
    side, hidden = patches.position.side, patches.hidden
    tables = {
        "weight": whole(f"{patches.name}.weight", (hidden, 3, patches.size, patches.size)),
        "positions": whole(f"{patches.position.name}.weight", (side * side + (patches.first is not None), hidden)),
    }
    if patches.bias:
        tables["bias"] = whole(f"{patches.name}.bias", (hidden,))
    if patches.first is not None:
        tables["first"] = whole(patches.first, (hidden,))
    return tables


def plan_joining(images: Images, hidden: int) -> dict[str, TablePlan]:
    """What the features of an image's pictures are joined with, of the decoder's width."""
    return {"newline": whole(images.cutting.newline, (hidden,))} if isinstance(images.cutting, Tiles) else {}


@singledispatch
def plan_stage(stage: object) -> MixerPlan:
    """What a stage holds, its layers apart."""
    return MixerPlan()


@plan_stage.register
def _(stage: Normalise) -> MixerPlan:
    return MixerPlan(tables=plan_norm(stage.norm, "", stage.width))


@plan_stage.register
def _(stage: Matrix) -> MixerPlan:
    return MixerPlan(tables={"weight": whole(stage.name, (stage.width, stage.out))})


@plan_stage.register
def _(stage: Feed) -> MixerPlan:
    part = stage.part
    span = ((0, part.width),)
    down = row(part.down, "", span, stage.out, part.width, WHOLE)
    if isinstance(part, GatedMlp):
        return MixerPlan({"gate_up": column(part.gate_up, "", (span, span), (part.width,) * 2, stage.width), "down": down})
    return MixerPlan({"up": column(part.up, "", (span,), (part.width,), stage.width), "down": down})


@plan_stage.register
def _(stage: Resample) -> MixerPlan:
    return MixerPlan(tables={"latents": whole(stage.latents, (stage.count, stage.width)), **plan_norm(stage.norm, "", stage.width)})


@plan_mixer.register
def _(mixer: Perceive, at: str, hidden: int, split: Split) -> MixerPlan:
    query, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    linears = {
        "query": column(mixer.query, at, (((0, query),),), (query,), hidden),
        "key_value": column(mixer.key_value, at, (((0, kv),),) * 2, (kv, kv), hidden),
        "out": row(mixer.out, at, ((0, query),), hidden, query, split),
    }
    features = {f"features.{key}": table for key, table in plan_norm(mixer.norm, at, hidden).items()}
    return MixerPlan(linears, features | _plan_heads(mixer.each, at, mixer.head_dim))


@plan_mixer.register
def _(mixer: LookAt, at: str, hidden: int, split: Split) -> MixerPlan:
    share, dim, width = split.heads(mixer.heads, mixer.heads), mixer.head_dim, mixer.heads * mixer.head_dim
    held = scaled(share.query, dim)
    linears = {
        "query": column(mixer.query, at, ((held,),), (width,), hidden),
        "key_value": column(mixer.key_value, at, ((held,), (held,)), (width, width), mixer.width),
        "out": row(mixer.out, at, (held,), hidden, width, split),
    }
    return MixerPlan(linears, _plan_heads(mixer.norm, at, dim), PageShape(share.heads, dim), page_use=PageUse.MEMORY)


def _plan_heads(norm: HeadNorm | None, at: str, dim: int) -> dict[str, TablePlan]:
    sides = {} if norm is None else {"query": norm.query, "key": norm.key}
    return {f"{side}.{key}": table for side, part in sides.items() for key, table in plan_norm(part, at, dim).items()}


def _encoder(images: Images) -> Iterator[MixerPlan]:
    encoder, hidden = images.encoder, images.encoder.patches.hidden
    yield MixerPlan(tables=plan_patches(encoder.patches))
    for norm in (encoder.before, encoder.after):
        if norm is not None:
            yield MixerPlan(tables=plan_norm(norm, "", hidden))
    yield from _layers(encoder.layers, hidden)


def _stage(stage: object) -> Iterator[MixerPlan]:
    yield plan_stage(stage)
    if isinstance(stage, Resample):
        yield from _layers(stage.layers, stage.width)


def _layers(layers: tuple[Layer, ...], hidden: int) -> Iterator[MixerPlan]:
    for layer in layers:
        for step in layer.steps:
            for norm in norms(step):
                yield MixerPlan(tables=plan_norm(norm, layer.at, hidden))
            for mixer in mixers(step):
                yield plan_mixer(mixer, layer.at, hidden, WHOLE)
