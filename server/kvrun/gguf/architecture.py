"""What a table of names says of an architecture, and the tables by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvrun.errors import Unsupported
from kvrun.gguf.container import Container

Config = dict[str, Any]
# How rows of a matrix lie in the file where the checkpoint has them otherwise. "pairs": within each head the numbers that
# rotate together are neighbours, and lie half a head apart in the checkpoint. "parts": all queries, all keys, all values; the
# checkpoint has each key/value head's queries, key and value together.
Order = Literal["pairs", "parts"]

SHAPE = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}
RMS = {**SHAPE, "head_dim": "attention.key_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
LAYER = {**SHAPE, "layer_norm_eps": "attention.layer_norm_epsilon"}


@dataclass(frozen=True)
class Architecture:
    """How files of one `general.architecture` name what a published checkpoint calls otherwise.

    Names leave out ".weight" and ".bias", but where these differ too; keys of the metadata the architecture's own name before them.
    """

    name: str
    serves: str  # the class of the published checkpoints
    ends: Mapping[str, str]  # tensors beside the layers -> modules
    at: str  # where layer {n} lies in the checkpoint
    layer: Mapping[str, str]  # tensors of a layer -> modules of it; {i} runs over a first dimension that the checkpoint has apart
    keys: Mapping[str, str]  # fields of config.json -> keys of the metadata; one that is not there is left out
    states: Mapping[str, Any] = field(default_factory=dict)  # fields that hold for every file
    derive: Callable[[Container, Config], Config] | None = None  # fields that follow from other fields or the tensors there are
    orders: Mapping[str, Order] = field(default_factory=dict)  # tensors of a layer whose rows lie in another order
    more: tuple[str, ...] = ()  # tensors, of a layer or not, that hold one more than the checkpoint does
    variant: tuple[str, Mapping[str, str]] | None = None  # a tensor of a layer, and modules that hold otherwise where it is there


_known: dict[str, Architecture] = {}


def register(*architectures: Architecture) -> None:
    """Make architectures known by their names."""
    for architecture in architectures:
        if architecture.name in _known:
            raise ValueError(f"architecture {architecture.name} is described twice")
        _known[architecture.name] = architecture


def known() -> list[str]:
    """The names of `general.architecture` that are read, sorted."""
    return sorted(_known)


def architecture_of(container: Container) -> Architecture:
    """The table for a file. Unsupported names the nearest and all others."""
    name = container.architecture
    if name not in _known:
        near = difflib.get_close_matches(name, known(), n=3, cutoff=0.5)
        hint = f"the nearest is {near[0]}, " if near else ""
        raise Unsupported(
            f"{container.file}: GGUF files of the architecture {name} are not read; {hint}read are {', '.join(known())}; "
            "serve the original checkpoint instead"
        )
    return _known[name]


def has(container: Container, tensor: str) -> bool:
    """Whether the first layer has a tensor: "attn_q.bias"."""
    return f"blk.0.{tensor}" in container.tensors
