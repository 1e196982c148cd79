"""Print a model's tree, for people and for the snapshots that a change to it is reviewed by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import groupby
from typing import Any

from kvrun.spec.model import Layer, Model


def describe(model: Model) -> str:
    """The tree of a model, equal neighbouring layers folded into one. Fields that hold their default are left out."""
    embed, head = model.decoder.embed, model.decoder.head
    lines = [f"positions {model.positions or 'unlimited'}", *_lines("embed", embed)]
    if model.encoder is not None:
        lines += ["encoder", *_layers(model.encoder.layers), *(f"  {line}" for line in _lines("norm", model.encoder.norm))]
        lines.append(f"decoder, begins with {model.start}")
    if model.images is not None:
        lines += _lines("images", model.images)
    if model.decoder.wide:
        lines.append("residuals in float32")
    return "\n".join([*lines, *_layers(model.decoder.layers), *_lines("head", head)]) + "\n"


def _layers(layers: tuple[Layer, ...]) -> Iterator[str]:
    """Equal neighbouring layers as one."""
    number = 0
    for steps, equal in groupby(layers, key=lambda layer: layer.steps):
        run: list[Layer] = list(equal)
        span = f"layer {number}" if len(run) == 1 else f"layers {number} to {number + len(run) - 1}"
        yield f"{span} at {run[0].at}"
        yield from (f"  {line}" for step in steps for line in _lines("", step))
        number += len(run)


def _lines(label: str, value: Any) -> Iterator[str]:
    """One line for the value with its plain fields, then its parts, indented."""
    stated = [(f, getattr(value, f.name)) for f in fields(value)]
    parts = [(f.name, v) for f, v in stated if v != () and (f.default is MISSING or v != f.default)]
    inline = " ".join(f"{name}={_plain(v)}" for name, v in parts if not _is_part(v))
    yield " ".join(filter(None, (label, type(value).__name__, inline)))
    for name, v in parts:
        if isinstance(v, tuple) and v and isinstance(v[0], Layer):
            yield from (f"  {line}" for line in _layers(v))
        elif _is_part(v):
            for part in v if isinstance(v, tuple) else (v,):
                yield from (f"  {line}" for line in _lines("" if isinstance(v, tuple) else name, part))


def _is_part(value: Any) -> bool:
    return is_dataclass(value) or (isinstance(value, tuple) and bool(value) and is_dataclass(value[0]))


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value).replace("\n", "\\n")
