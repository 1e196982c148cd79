"""The adapters that are resident on this rank, and which rows of a step use which of them."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.errors import AdapterError, AdapterTooLarge, ProtocolError
from kvrun.lora.adapter import EMBEDDING, HOST, Adapter, read_adapter
from kvrun.lora.placed import Carrier, Packed, Room
from kvrun.lora.sites import EmbeddingSite, Site


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent tokens of a step, `start` up to `stop`, that use one adapter."""

    start: int
    stop: int
    adapter: Adapter


class LoraBatch:
    """What the adapters of one step change, for every linear that some of them changes: ranks and targets as they come."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._joined: dict[int, ops.LoraSegments | None] = {}
        self._coming = list(dict.fromkeys(run.adapter.coming for run in runs if run.adapter.coming is not None))

    @cached_property
    def pointed(self) -> list[tuple[int, int, ops.LoraPointers]] | None:
        """Runs of tokens whose adapter changes linears, and where a GPU finds it; None where segments are read instead."""
        runs = [run for run in self._runs if run.adapter.updates]
        found = [(run.start, run.stop, run.adapter.pointers) for run in runs if run.adapter.pointers is not None]
        return found if len(found) == len(runs) else None

    @cached_property
    def _table(self) -> ops.LoraTable | None:
        return ops.LoraTable(self.pointed) if self.pointed else None

    def apply(self, site: int, x: Tensor, y: Tensor) -> None:
        """Add to `y` what the adapters of these rows change at linear `site`.

        x [tokens, in_features] · y [tokens, out_features], changed in place · rows of no adapter are not touched.
        """
        self._wait(site)
        if self._table is not None:
            ops.lora(y, x, ops.LoraUse(self._table, ops.LoraSites((site,))))
        elif (segments := self._segments(site)) is not None:
            ops.lora(y, x, segments)

    def arrive(self) -> None:
        """Have what is computed next wait until every adapter of these rows is there: a captured step waits for nothing within it."""
        for coming in self._coming:
            coming.finish()

    def _wait(self, *sites: int) -> None:
        for coming in self._coming:
            for site in sites:
                coming.wait(site)

    def apply_grouped(self, sites: ops.LoraSites, x: Tensor, y: Tensor, tokens: Tensor, offsets: Tensor | None = None) -> None:
        """The same where rows offsets[g] to offsets[g + 1] belong to linear sites[g]; without offsets, all to the only one.

        tokens [rows] int64: the token each row was made of, ascending within a linear.
        """
        self._wait(*sites.numbers)
        if self._table is not None:
            return ops.lora(y, x, ops.LoraUse(self._table, sites, tokens, offsets))
        changed = {group: segments for group, site in enumerate(sites.numbers) if (segments := self._segments(site)) is not None}
        if not changed:
            return None
        # Where this is no GPU's kernel but the reference, it waits for what made them: only for linears that some adapter changes.
        bounds = np.array([0, len(tokens)]) if offsets is None else offsets.cpu().numpy()
        owners, parts = tokens.cpu().numpy(), []
        for group in np.flatnonzero(np.diff(bounds)).tolist():
            segments = changed.get(group)
            if segments is None:
                continue
            first, mine = int(bounds[group]), owners[bounds[group] : bounds[group + 1]]
            for updates, start, stop in segments.parts:
                begin, end = int(np.searchsorted(mine, start)), int(np.searchsorted(mine, stop))
                if begin < end:
                    parts.append((updates, first + begin, first + end))
        if parts:
            ops.lora(y, x, ops.LoraSegments.joined(parts))
        return None

    def _segments(self, site: int) -> ops.LoraSegments | None:
        """Those of one linear, of all runs; None where no adapter changes it."""
        if site not in self._joined:
            parts = [(updates, run.start, run.stop) for run in self._runs if (updates := run.adapter.updates.get(site)) is not None]
            self._joined[site] = ops.LoraSegments.joined(parts) if parts else None
        return self._joined[site]

    def embed(self, ids: Tensor, x: Tensor) -> None:
        """Add to `x`, in place, what the adapters of these tokens change in their embeddings. ids [tokens] · x [tokens, width]"""
        for run in self._runs:
            changed = run.adapter.embedding
            if changed is not None:
                self._wait(EMBEDDING)
                rows = changed.table[ids[run.start : run.stop]]
                ops.lora(x[run.start : run.stop], rows, ops.LoraSegments.joined([(changed.update, 0, len(rows))]))


class AdapterTable:
    """Adapters by the router's handles, within a budget of bytes. Loads run beside steps, on threads of their own.

    Where there is room for them in pages, they wait on the host, and steps place and displace them.
    """

    def __init__(self, linears: Iterable[Site], dtype: torch.dtype, embedding: EmbeddingSite | None, carrier: Carrier) -> None:
        self._linears = list(linears)
        self._embedding = embedding
        self._dtype = dtype
        self._carrier = carrier  # to where the model lies
        self._lock = threading.Lock()
        self._adapters: dict[int, Adapter] = {}
        self._room: Room | None = None
        self._packed: dict[int, Packed] = {}
        self._placed: dict[int, Adapter] = {}
        self._coming: list[Adapter] = []  # placed by the step that is being computed
        self._budget = 0
        self._last: tuple[Sequence[Run], LoraBatch] | None = None

    @property
    def bytes(self) -> int:
        """Bytes that the resident adapters take on this rank."""
        with self._lock:
            return sum(adapter.bytes for adapter in self._adapters.values())

    def reset(self, budget: int, room: Room | None = None) -> None:
        """Forget every adapter and set the bytes that new ones may take.

        room: the pages that they are placed in; None = they lie where the model does
        """
        with self._lock:
            self._adapters, self._packed, self._budget, self._last = {}, {}, budget, None
            self._room, self._placed, self._coming = room, {}, []

    def load(self, handle: int, name: str, path: str) -> Adapter:
        """Read an adapter from its folder and make it resident. Raises AdapterError, AdapterNotFound, AdapterTooLarge, ProtocolError."""
        if handle == 0:
            raise ProtocolError(f"adapter {name}: handle 0 is the base model's")
        with self._lock:
            # Of this epoch: a reset meanwhile must not receive what was read for the last.
            adapters, packs, room, place = self._adapters, self._packed, self._room, self._carrier.place
        try:
            adapter = read_adapter(path, self._linears, self._dtype, self._embedding, place)
        except AdapterError as error:
            raise type(error)(f"adapter {name}: {error}") from error
        packed = None if room is None else room.pack(adapter, self._carrier)
        if packed is not None:
            adapter = packed.adapter
        elif place != HOST:
            adapter = adapter.carried(lambda matrix: matrix.to(place))
        with self._lock:
            if handle in adapters:
                raise ProtocolError(f"adapter {name}: handle {handle} is taken")
            used = sum(other.bytes for other in adapters.values())
            if used + adapter.bytes > self._budget:
                free = f"{max(self._budget - used, 0)} of {self._budget} are free"
                raise AdapterTooLarge(f"adapter {name} takes {adapter.bytes} bytes, {free}; unload another first or raise --adapter-bytes")
            adapters[handle] = adapter
            if packed is not None:
                packs[handle] = packed
        return adapter

    def unload(self, handle: int) -> None:
        """Forget an adapter. Sequences that still hold it keep it alive until they are released.

        Its pages are its own until it is displaced.
        """
        with self._lock:
            self._adapters.pop(handle, None)
            self._packed.pop(handle, None)
            self._last = None

    def move(self, displaced: Iterable[int], placed: Iterable[tuple[int, int]], in_use: Container[int]) -> None:
        """Take adapters out of their pages, then begin to bring others into theirs; `settle` ends that. Raises ProtocolError.

        placed: handles, each with the lowest of its pages · in_use: handles of admitted sequences
        """
        for handle in displaced:
            if handle in in_use:
                raise ProtocolError(f"adapter handle {handle} is displaced while admitted sequences use it; release them first")
            if self._placed.pop(handle, None) is None:
                raise ProtocolError(f"adapter handle {handle} is displaced and lies in no pages")
            self._last = None
        for handle, first in placed:
            self._place(handle, first)

    def _place(self, handle: int, first: int) -> None:
        with self._lock:
            packed = self._packed.get(handle)
        if packed is None or self._room is None or handle in self._placed:
            why = "it lies in pages already" if handle in self._placed else "no adapter that wants pages is loaded under it"
            raise ProtocolError(f"adapter handle {handle} cannot be placed: {why}")
        try:
            adapter = self._room.place(packed, first, self._carrier)
        except ProtocolError as error:
            raise ProtocolError(f"adapter handle {handle} cannot be placed: {error}") from error
        self._placed[handle] = adapter
        self._coming.append(adapter)

    def settle(self) -> None:
        """Have what is computed after this step wait until all adapters are there that it placed."""
        for adapter in self._coming:
            if adapter.coming is not None:
                adapter.coming.finish()
        self._coming.clear()

    def get(self, handle: int) -> Adapter | None:
        """The adapter of a handle as steps compute it; None for 0, the base model. Raises ProtocolError."""
        if handle == 0:
            return None
        with self._lock:
            adapter = self._adapters.get(handle)
        if adapter is None:
            raise ProtocolError(f"adapter handle {handle} is not resident; load it first")
        if not adapter.pages:
            return adapter
        if handle not in self._placed:
            raise ProtocolError(f"adapter handle {handle} lies in no pages; place it first")
        return self._placed[handle]

    def batch(self, runs: Sequence[Run]) -> LoraBatch | None:
        """The segments of a step, or None when no row has an adapter. Decoding keeps its composition, so the last batch is kept."""
        if not runs:
            return None
        last = self._last
        if last is not None and last[0] == runs:
            return last[1]
        batch = LoraBatch(runs)
        self._last = (runs, batch)
        return batch
