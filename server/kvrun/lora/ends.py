"""What PEFT saves for the two ends of a model: an embedding's changes, a head under another name, and copies of base weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.errors import AdapterError
from kvrun.lora.peft import PeftConfig
from kvrun.lora.sites import EmbeddingSite, Site

EMBEDDING = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.default)?$")
COPY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.(?P<vector>weight|bias)$")


@dataclass(frozen=True, eq=False)
class EmbeddingDelta:
    """What an adapter adds to the embedding of an id: a row of `table` times the update's B. Whole on every rank."""

    table: Tensor  # [vocabulary, rank]
    update: ops.LoraSegments  # over rows of `table`: A is one, B is [rank, width]

    @classmethod
    def of(cls, table: Tensor, one: Tensor, bt: Tensor) -> EmbeddingDelta:
        """one: [rank, rank]"""
        return cls(table, ops.LoraSegments([ops.Segment(0, 0, one, bt, 0)]))

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `of` makes it of."""
        (segment,) = self.update.segments
        return self.table, segment.a, segment.bt

    def carried(self, where: Callable[[Tensor], Tensor]) -> EmbeddingDelta:
        """The same with every matrix as `where` answers for it."""
        return EmbeddingDelta.of(*map(where, self.matrices))


def renamed(tensors: Mapping[str, Tensor], linears: Iterable[Site]) -> dict[str, Tensor]:
    """The tensors by the names of the checkpoint's modules. Raises AdapterError when two names mean one tensor."""
    found: dict[str, Tensor] = {}
    other = {source.also: source.module for linear in linears for source in linear.sources if source.also not in ("", source.module)}
    for name, tensor in tensors.items():
        bare = name.removeprefix("base_model.model.")
        known = next((module + bare[len(also) :] for also, module in other.items() if bare.startswith(f"{also}.")), name)
        if known in found:
            raise AdapterError(f"{name} and another tensor both mean {known}; keep one of them")
        found[known] = tensor
    return found


def leave_out_copies(tensors: dict[str, Tensor], linear: Site, dtype: torch.dtype) -> None:
    """Drop copies of this linear's base weight and bias, which PEFT saves beside a changed head.

    Raises AdapterError when one is not what this rank holds.
    """
    for name in [name for name in tensors if COPY.match(name)]:
        module, vector = COPY.match(name).groups()  # type: ignore[union-attr]
        for source in (source for source in linear.sources if source.module == module):
            copy, part = tensors.pop(name), slice(source.column, source.column + len(source.rows))
            shape = (source.out_features, source.in_features) if vector == "weight" else (source.out_features,)
            held = linear.weight.dense() if vector == "weight" else linear.bias
            if copy.shape != shape or held is None or not _held(copy[source.rows], held[part], linear, vector, dtype):
                raise AdapterError(f"{name} is not the base model's; train with the base as it was published")


def embedding_delta(
    tensors: dict[str, Tensor], site: EmbeddingSite, config: PeftConfig, dtype: torch.dtype, place: torch.device
) -> EmbeddingDelta | None:
    """Take the embedding's A, B and base copy out of the tensors; None when the adapter does not change it. Raises AdapterError.

    place: where the embedding's rows lie
    """
    found: dict[str, Tensor] = {}
    for name in list(tensors):
        match, copy = EMBEDDING.match(name), COPY.match(name)
        if match is not None and match["module"] == site.module:
            found[match["side"]] = tensors.pop(name)
        elif copy is not None and copy["module"] == site.module:
            base, (first, end) = tensors.pop(name), site.held
            whole = base.shape == (site.vocabulary, site.width)
            if not whole or not _equal(base[first:end], site.rows(torch.arange(end - first, device=place)), dtype):
                raise AdapterError(f"{name} is not the base model's; train with the base as it was published")
    if not found:
        return None
    rank = config.rank(site.module)
    for side, shape in (("A", (rank, site.vocabulary)), ("B", (site.width, rank))):
        if side not in found:
            raise AdapterError(f"without its other half: {site.module}.lora_embedding_{next(iter(found))}")
        if tuple(found[side].shape) != shape or not found[side].is_floating_point():
            shown = f"{str(found[side].dtype).removeprefix('torch.')} {list(found[side].shape)}, not {list(shape)}"
            raise AdapterError(f"wrong shape: {site.module}.lora_embedding_{side} is {shown}; the adapter belongs to another model")
    bt = (found["B"].float() * config.scale(site.module)).T.to(dtype).contiguous()
    return EmbeddingDelta.of(found["A"].T.to(dtype).contiguous(), torch.eye(rank, dtype=dtype), bt)


def _equal(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(one.to(dtype), other.to(one.device, dtype))


def _held(plain: Tensor, held: Tensor, linear: Site, vector: str, dtype: torch.dtype) -> bool:
    """Whether a copy is what a rank holds of it, or what the rank would make of the published numbers."""
    return _equal(plain, held, dtype) or (vector == "weight" and _equal(linear.weight.of_plain(plain), held, dtype))
