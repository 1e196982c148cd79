"""The tensors of a GGUF file under the names of the published checkpoint, and what must be done to each when it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvrun.gguf.architecture import Architecture, Order
from kvrun.gguf.container import Container, Tensor

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Read into the config, not into the model.
ROTATION = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# The only tables of two dimensions or more that nothing is multiplied with, beside those of a vector for each head.
TABLES = ("position_embd", "attn_q_norm", "attn_k_norm")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint lies."""

    tensor: Tensor
    shape: tuple[int, ...]  # in numbers
    matrix: bool  # something is multiplied with it, so that it may stay in blocks
    index: int | None = None  # along a first dimension that the checkpoint does not have
    order: Order | None = None
    more: float = 0.0  # than the checkpoint holds


def places(container: Container, architecture: Architecture) -> dict[str, Place]:
    """name -> place, for every tensor. One that the architecture does not know keeps its own name, so that it is found unread."""
    return {
        name: place
        for tensor, held in container.tensors.items()
        if tensor not in ROTATION
        for name, place in _places(tensor, held, container, architecture)
    }


def rows(order: Order, config: dict[str, Any], count: int) -> list[int]:
    """For each of `count` rows of the checkpoint the row of the file, for a `config` that says how many heads there are."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    if order == "pairs":
        dim = config.get("head_dim") or config["hidden_size"] // heads
        return [row - row % dim + 2 * (row % dim % (dim // 2)) + row % dim // (dim // 2) for row in range(count)]
    group = heads // kv_heads
    dim = count // (heads + 2 * kv_heads)
    first = {group: heads, group + 1: heads + kv_heads}  # keys, values
    found = []
    for row in range(count):
        kv, place = divmod(row // dim, group + 2)
        head = first[place] + kv if place in first else kv * group + place
        found.append(head * dim + row % dim)
    return found


def _places(name: str, tensor: Tensor, container: Container, architecture: Architecture) -> Iterator[tuple[str, Place]]:
    own, _, suffix = name.rpartition(".")
    module = _module(own, container, architecture)
    if module is None:
        yield _module(name, container, architecture) or name, Place(tensor, tensor.shape, False)
        return
    bare = own.rpartition(".")[2]
    order, more = architecture.orders.get(bare), float(bare in architecture.more)
    matrix = suffix == "weight" and bare not in TABLES and (len(tensor.shape) > 1 or bare == "ffn_gate_inp_shexp")
    if "{i}" in module:
        for index in range(tensor.shape[0]):
            yield f"{module.format(i=index)}.{suffix}", Place(tensor, tensor.shape[1:], matrix, index, order, more)
        return
    # A gate with one output is stored as a vector.
    shape = (1, *tensor.shape) if matrix and len(tensor.shape) == 1 else tensor.shape
    yield f"{module}.{suffix}", Place(tensor, shape, matrix, None, order, more)


def _module(own: str, container: Container, architecture: Architecture) -> str | None:
    """What the checkpoint calls that for which the file has a name: a module, or a tensor that differs in its suffix too."""
    found = LAYER.fullmatch(own)
    if found is None:
        return architecture.ends.get(own)
    known = architecture.layer
    if architecture.variant is not None and f"blk.{found[1]}.{architecture.variant[0]}.weight" in container.tensors:
        known = {**known, **architecture.variant[1]}
    module = known.get(found[2])
    return None if module is None else f"{architecture.at.replace('{n}', found[1])}.{module}"
