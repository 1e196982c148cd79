"""The servers that are measured: how each is started and asked, one file for each.

A server is a `Peer`. It says by which command it serves a `Setup`, what a request adds to the common body, and how many
bytes of weights a step of it reads. A new one is one small file and a line in `find`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Unavailable(Exception):
    """Why a peer cannot serve what it is asked for, and what to do about it."""


@dataclass(frozen=True)
class Model:
    """A folder that make_model.py wrote, and what its config says of sizes."""

    folder: Path

    @property
    def adapters(self) -> list[Path]:
        """The adapters beside it, in the order they were made."""
        found = [path.parent for path in (self.folder / "adapters").glob("*/adapter_config.json")]
        return sorted(found, key=lambda path: int(path.name.removeprefix("lora").partition("-")[0]))

    @property
    def sizes(self) -> dict[str, int]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in two bytes a number."""
        head = self.sizes["hidden_size"] // self.sizes["num_attention_heads"]
        return 2 * 2 * self.sizes["num_hidden_layers"] * self.sizes["num_key_value_heads"] * head

    @property
    def linear_parameters(self) -> int:
        """Of all layers, embedding and head apart."""
        s = self.sizes
        h, kv = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"]
        return s["num_hidden_layers"] * h * (2 * h + 2 * kv + 3 * s["intermediate_size"])

    @property
    def head_parameters(self) -> int:
        return self.sizes["hidden_size"] * self.sizes["vocab_size"]


@dataclass(frozen=True)
class Setup:
    """What a server is started for."""

    model: Model
    weights: str = "bf16"
    """bf16, int8 or int4: each peer's own format of that many bits."""
    adapters: tuple[Path, ...] = ()
    streams: int = 32
    context: int = 1280
    """Tokens of a prompt and its answer."""
    resident: int = 0
    """How many of the adapters memory is planned for; all of them where it is left out."""
    packed: Path | None = None
    """A folder for weights in their packed form, where a server keeps them."""

    @property
    def kv_bytes(self) -> int:
        """What keys and values of all streams at their longest take."""
        return self.streams * self.context * self.model.kv_bytes


class Peer(Protocol):
    """One way to serve a model over HTTP."""

    @property
    def name(self) -> str:
        """What a table calls it."""

    def label(self, setup: Setup) -> str:
        """The name of a table's row."""

    def prepare(self, setup: Setup) -> None:
        """Write what a start needs, such as converted weights; raises `Unavailable` where this peer cannot serve the setup."""

    def command(self, setup: Setup, port: int) -> list[str]: ...

    def environment(self, setup: Setup) -> dict[str, str]: ...

    def naming(self, setup: Setup, adapter: Path | None) -> dict:
        """The fields of a request that choose the base or an adapter."""

    def reusing(self) -> dict:
        """The fields of a request that may take from a cache what the server read of the same prompt before."""

    def step_bytes(self, setup: Setup) -> int:
        """Bytes of weights that one step reads."""


def find(root: Path, llama_cpp: Path | None, vllm: Path | None, threads: int) -> Iterator[Peer]:
    """kv.run of this tree, and the peers that there are."""
    from .kvrun import KvRun
    from .llama_cpp import LlamaCpp
    from .vllm import Vllm

    yield KvRun(root / ".venv" / "bin", threads)
    for peer in (LlamaCpp.find(llama_cpp, threads), Vllm.find(vllm, threads)):
        if peer:
            yield peer
