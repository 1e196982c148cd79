"""From a description of how a model sees to the modules that do it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor

from kvrun.nn.heads import per_head, vectors_of
from kvrun.nn.linear import Linear
from kvrun.nn.norms import Norm, norm_of
from kvrun.nn.parts import Parts, Shared, build_mixer
from kvrun.nn.residual import PostNorm, Residual
from kvrun.nn.vision import stages as modules
from kvrun.nn.vision.patches import FractionalPositions, GridPositions, Patches
from kvrun.nn.vision.sight import Sight
from kvrun.spec import Feed, Images, Layer, Matrix, Normalise, Perceive, Pool, Resample, Step, WithoutFirst
from kvrun.spec import norms as spec_norms
from kvrun.spec import vision as spec
from kvrun.weights.parts.vision import plan_joining, plan_patches, plan_stage
from kvrun.weights.plan import LinearPlan, TablePlan


class Walk(Protocol):
    """What makes the modules of layers of one width, all whole on this rank."""

    shared: Shared
    hidden: int

    def step(self, step: Step, at: str) -> Residual | PostNorm: ...
    def norm(self, norm: spec_norms.Norm, at: str) -> Norm: ...
    def tables(self, plans: Mapping[str, TablePlan]) -> dict[str, Tensor]: ...
    def linear(self, plan: LinearPlan) -> Linear: ...
    def aside(self, hidden: int) -> Walk: ...


def build_sight(images: Images, walk: Walk) -> Sight:
    """All of it; `walk.aside` walks over layers of another width."""
    encoder = images.encoder
    inside = walk.aside(encoder.patches.hidden)
    return Sight(
        images,
        _patches(encoder.patches, inside),
        None if encoder.before is None else inside.norm(encoder.before, ""),
        _residuals(encoder.layers, inside),
        None if encoder.after is None else inside.norm(encoder.after, ""),
        tuple(build_stage(stage, walk) for stage in images.stages),
        walk.tables(plan_joining(images, walk.hidden)),
        walk.shared.dtype,
    )


def _residuals(layers: tuple[Layer, ...], walk: Walk) -> tuple[Residual | PostNorm, ...]:
    return tuple(walk.step(step, layer.at) for layer in layers for step in layer.steps)


def _patches(patches: spec.Patches, walk: Walk) -> Patches:
    tables = walk.tables(plan_patches(patches))
    positions, first = tables["positions"], tables.get("first")
    if first is not None:
        first, positions = first + positions[0], positions[1:]
    kind = GridPositions if isinstance(patches.position, spec.GridPositions) else FractionalPositions
    return Patches(tables["weight"], tables.get("bias"), kind(positions, patches.position.side), first)


@singledispatch
def build_stage(stage: object, walk: Walk) -> modules.Stage:
    """The module of a described stage."""
    raise TypeError(f"no module for a {type(stage).__name__}")


@build_stage.register
def _(stage: WithoutFirst, walk: Walk) -> modules.Stage:
    return modules.without_first


@build_stage.register
def _(stage: Pool, walk: Walk) -> modules.Stage:
    return modules.Pool(stage.side)


@build_stage.register
def _(stage: Normalise, walk: Walk) -> modules.Stage:
    return modules.Rowwise(walk.aside(stage.width).norm(stage.norm, ""))


@build_stage.register
def _(stage: Matrix, walk: Walk) -> modules.Stage:
    weight = walk.tables(plan_stage(stage).tables)["weight"]
    return modules.Rowwise(lambda x: torch.matmul(x, weight))


@build_stage.register
def _(stage: Feed, walk: Walk) -> modules.Stage:
    inside = walk.aside(stage.width)
    linears = {key: inside.linear(plan) for key, plan in plan_stage(stage).linears.items()}
    return modules.feed(build_mixer(stage.part, Parts(linears, {}, None, (), inside.shared)))


@build_stage.register
def _(stage: Resample, walk: Walk) -> modules.Stage:
    inside = walk.aside(stage.width)
    latents = inside.tables(plan_stage(stage).tables)["latents"]
    return modules.Resample(latents, _residuals(stage.layers, inside), inside.norm(stage.norm, ""))


@build_mixer.register
def _(mixer: Perceive, parts: Parts) -> modules.Perceive:
    norm = norm_of(mixer.norm, vectors_of(parts.tables, "features"))
    each = None if mixer.each is None else per_head(mixer.each, parts.tables)
    return modules.Perceive(mixer.heads, mixer.kv_heads, mixer.head_dim, norm, **parts.linears, each=each)
