"""Which rows use which adapter, and where its matrices lie, as a GPU reads both: by address, so that one table serves every linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvrun_kernels.sgmv.op import LoraSegments

TILE = 16  # rows of a tile, and ranks: what a tensor core takes at least
FIELDS = 7  # numbers of a segment in the table of LoraSegments
PART, ENTRY = 5, 3  # numbers of a part: a, bt, rank, columns, column · of a tile of rows: start, rows, address of the pointers
ALIGNED = 16  # bytes, of the widest load
PARTS, WIDEST, REACH, INPUTS = range(4)  # what `LoraPointers.sizes` holds


class LoraPointers:
    """Where the matrices of one adapter lie: a table on the device, and what the host must know of it.

    held [sites + 1 + parts * 5] int64: the parts of site s begin at number held[s] and end before number held[s + 1] ·
    sizes [4, sites] int64 on the host: of each site its parts, the columns of the widest, their last column, its inputs
    """

    def __init__(self, updates: Mapping[int, LoraSegments], sites: int):
        """updates: what the adapter changes, by site, in segments whose rows do not count; all of one dtype · sites: of the model"""
        found = [(site, part) for site, part in sorted(updates.items()) if len(part)]
        first = found[0][1]
        counts: np.ndarray = np.zeros(sites, np.int64)
        counts[[site for site, _ in found]] = [len(part) for _, part in found]
        rows = np.concatenate([np.frombuffer(part.table, np.int64).reshape(-1, FIELDS) for _, part in found])
        parts = rows[:, 2:]
        where: np.ndarray = np.repeat(np.arange(sites), counts)
        columns, last = parts[:, 3], parts[:, 3] + parts[:, 4]
        heads = sites + 1 + PART * np.concatenate([[0], np.cumsum(counts)])
        self.sizes: np.ndarray = np.zeros((4, sites), np.int64)
        self.sizes[PARTS] = counts
        np.maximum.at(self.sizes[WIDEST], where, columns)
        np.maximum.at(self.sizes[REACH], where, last)
        self.sizes[INPUTS, [site for site, _ in found]] = [part.inputs for _, part in found]
        self.rank = int(parts[:, 2].max())
        self.dtype = first.dtype
        size = self.dtype.itemsize
        strides = np.stack([self.sizes[INPUTS][where], columns]) * size
        self.aligned = not (parts[:, :2] % ALIGNED).any() and not (strides % ALIGNED).any()
        self.held = _staged(np.concatenate([heads, parts.reshape(-1)]), first.device).to(first.device, non_blocking=True)
        self.address = self.held.data_ptr()


Run = tuple[int, int, LoraPointers]  # adjacent rows, start up to stop, and what they use


class LoraTable:
    """The rows of a step and their adapters, for all linears. It is filled in place: a captured CUDA graph sees new contents.

    held [tiles * 3 + rows] int64: tiles of rows of one adapter, then the adapter of each row, 0 for none. Tiles without rows
    cost a program that ends at once.
    """

    def __init__(self, runs: Sequence[Run]):
        """The table of these runs, at least one, which rise and do not overlap."""
        pointers = list({id(used): used for _, _, used in runs}.values())
        self.dtype, self.aligned = pointers[0].dtype, all(used.aligned for used in pointers)
        self.rank = max(used.rank for used in pointers)
        self.sizes: np.ndarray = np.max([used.sizes for used in pointers], axis=0)
        self.tiles, self.rows = sum(-(-(stop - start) // TILE) for start, stop, _ in runs), runs[-1][1]
        self.spread = len(runs)  # no tile of rows has more adapters
        self.held = torch.empty(self.tiles * ENTRY + self.rows, dtype=torch.int64, device=pointers[0].held.device)
        self.fill(runs)

    @classmethod
    def of_room(cls, rows: int, rank: int, sizes: np.ndarray, dtype: torch.dtype, *, aligned: bool, place: torch.device) -> LoraTable:
        """An empty table with room for any adapters of so many rows, up to this rank, of `LoraPointers.sizes` as given.

        aligned: whether every row of the matrices to come begins at a multiple of `ALIGNED` bytes
        """
        table = cls.__new__(cls)
        table.dtype, table.aligned, table.rank, table.sizes = dtype, aligned, rank, sizes
        table.tiles = table.rows = table.spread = rows
        table.held = torch.zeros(rows * (ENTRY + 1), dtype=torch.int64, device=place)
        table._kept = ()
        return table

    def fill(self, runs: Sequence[Run]) -> None:
        """Replace the contents; the buffer stays where it is. ValueError for what has no room or is laid out otherwise.

        The host does not wait for the copy.
        """
        self.held.copy_(_staged(self.contents(runs), self.held.device), non_blocking=True)
        self._kept = tuple(used for _, _, used in runs)

    def contents(self, runs: Sequence[Run]) -> np.ndarray:
        """What the table holds for these runs. ValueError for what has no room or is laid out otherwise."""
        held: np.ndarray = np.zeros(self.tiles * ENTRY + self.rows, np.int64)
        if not runs:
            return held
        for used in {id(used): used for _, _, used in runs}.values():
            self._check(used)
        starts, stops, addresses = (np.array(numbers, np.int64) for numbers in zip(*((a, b, used.address) for a, b, used in runs)))
        counts = -(-(stops - starts) // TILE)
        of_run: np.ndarray = np.repeat(np.arange(len(runs)), counts)
        firsts = starts[of_run] + TILE * (np.arange(len(of_run)) - np.repeat(np.cumsum(counts) - counts, counts))
        if len(of_run) > self.tiles or stops[-1] > self.rows:
            raise ValueError(f"room for {self.tiles} tiles of {self.rows} rows; found {len(of_run)} of {stops[-1]}; make more")
        tiles, owners = held[: self.tiles * ENTRY].reshape(-1, ENTRY), held[self.tiles * ENTRY :]
        tiles[: len(of_run)] = np.stack([firsts, np.minimum(stops[of_run] - firsts, TILE), addresses[of_run]], axis=1)
        lengths = np.stack([starts - np.concatenate([[0], stops[:-1]]), stops - starts], axis=1).reshape(-1)
        owners[: stops[-1]] = np.repeat(np.stack([np.zeros_like(addresses), addresses], axis=1).reshape(-1), lengths)
        return held

    def most(self, sites: LoraSites) -> list[int]:
        """The largest of `LoraPointers.sizes` among these linears."""
        numbers = sites.numbers
        found: list[int] = (self.sizes[:, numbers[0]] if len(numbers) == 1 else self.sizes[:, numbers].max(axis=1)).tolist()
        return found

    def _check(self, used: LoraPointers) -> None:
        if used.dtype != self.dtype or (self.aligned and not used.aligned) or used.rank > self.rank:
            raise ValueError(
                f"a table of {self.dtype} up to rank {self.rank} was made{' for aligned adapters' * self.aligned}; found one of "
                f"{used.dtype} and rank {used.rank}{' that is not' * (not used.aligned)}; make another table for it"
            )


class LoraSites(NamedTuple):
    """Linears that one call multiplies with."""

    numbers: tuple[int, ...]  # their sites
    held: Tensor | None = None  # the same on the device, int64; None of a single one


class LoraUse(NamedTuple):
    """What a table says to a linear whose rows are the step's; or to several of which each has rows of its own.

    Row n of those was made of the step's row tokens[n], ascending within a linear, tokens [rows] int64 · linear g has rows
    offsets[g] to offsets[g + 1], int64, or a single one all.
    """

    table: LoraTable
    sites: LoraSites
    tokens: Tensor | None = None
    offsets: Tensor | None = None


def _staged(numbers: np.ndarray, device: torch.device) -> Tensor:
    """The numbers where a copy to the device does not hold up the host."""
    made = torch.from_numpy(numbers)
    if device.type != "cuda":
        return made
    # Pinned blocks come from PyTorch's cache of them, which gives one again only when the copy out of it is done.
    return torch.empty(made.shape, dtype=made.dtype, pin_memory=True).copy_(made)
