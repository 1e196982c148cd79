"""Adapters in pages: how the matrices of one lie in a run of adjacent pages of the pool, and on the host until they are brought there.

Adjacent pages are one stretch of memory in every layer of the pool. Matrices fill these stretches one after another in the order in
which a step computes them, so that the first layers may begin while the last ones are still on their way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from kvrun_kernels.sgmv.table import ALIGNED
from torch import Tensor

from kvrun.errors import ProtocolError
from kvrun.lora.adapter import Adapter


class Arrival(Protocol):
    """Copies on their way: see device.Arrival."""

    def wait(self, part: int) -> None: ...


class Carrier(Protocol):
    """Where the model lies: see device.Device."""

    @property
    def place(self) -> torch.device: ...
    def staged(self, size: int) -> Tensor: ...
    def bring(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Arrival: ...


@dataclass(frozen=True)
class Spot:
    """Where a matrix lies: which stretch, and how many bytes after its begin."""

    stretch: int
    offset: int


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter on the host, as it will lie in pages: what it puts into each stretch, end to end."""

    adapter: Adapter  # its matrices are views of `block`
    block: Tensor  # uint8
    ends: tuple[int, ...]  # of each stretch in the block
    spots: Mapping[Tensor, Spot]  # of the adapter's matrices


class Coming:
    """An adapter on its way into pages, of which a step waits for what it is about to read."""

    def __init__(self, arrival: Arrival, parts: Mapping[int, int]) -> None:
        """parts: of each linear, the last copy that brings something of it; they are done one after another"""
        self._arrival, self._parts = arrival, parts
        self._there = -1

    def wait(self, site: int) -> None:
        """See lora.adapter.Coming."""
        self._wait(self._parts.get(site, -1))

    def finish(self) -> None:
        """See lora.adapter.Coming."""
        self._wait(max(self._parts.values(), default=-1))

    def _wait(self, part: int) -> None:
        if part > self._there:
            self._arrival.wait(part)
            self._there = part


class Room:
    """The layers of a page pool as places for adapters."""

    def __init__(self, layers: Sequence[Tensor], pages: int) -> None:
        """layers: [at least pages, ...] of any dtype, contiguous"""
        self._pages = pages
        self._layers = [layer.view(torch.uint8).flatten() for layer in layers]
        self._widths = [layer[0].numel() * layer.element_size() for layer in layers]  # bytes of a page

    def pack(self, adapter: Adapter, carrier: Carrier) -> Packed:
        """Lay an adapter out on the host for as few pages as hold it, more than there are if need be."""
        matrices = adapter.matrices()
        sizes = [-(-matrix.nbytes // ALIGNED) * ALIGNED for matrix in matrices]
        pages, spots = self._fitted(sizes)
        filled = [0] * len(self._widths)
        for spot, size in zip(spots, sizes, strict=True):
            filled[spot.stretch] = spot.offset + size
        ends = tuple(accumulate(filled))
        block = carrier.staged(ends[-1])
        held: dict[Tensor, Tensor] = {}
        for matrix, spot in zip(matrices, spots, strict=True):
            begin = ends[spot.stretch] - filled[spot.stretch] + spot.offset
            held[matrix] = _seen_as(matrix, block[begin : begin + matrix.nbytes])
            held[matrix].copy_(matrix)
        packed = replace(adapter.carried(held.__getitem__), pages=pages)
        return Packed(packed, block, ends, {held[matrix]: spot for matrix, spot in zip(matrices, spots, strict=True)})

    def place(self, packed: Packed, first: int, carrier: Carrier) -> Adapter:
        """Begin to bring an adapter into its pages from `first` on: the adapter as it will lie there. Raises ProtocolError."""
        pages, adapter = packed.adapter.pages, packed.adapter
        if first + pages > self._pages:
            raise ProtocolError(f"it wants {pages} pages from {first} on, and {self._pages} are reserved")
        begins = [-(-first * width // ALIGNED) * ALIGNED for width in self._widths]
        copies: list[tuple[Tensor, Tensor]] = []
        parts, begin = dict[int, int](), 0
        for stretch, end in enumerate(packed.ends):
            if end > begin:
                at = begins[stretch]
                parts[stretch] = len(copies)
                copies.append((self._layers[stretch][at : at + end - begin], packed.block[begin:end]))
            begin = end
        places = [copies[parts[stretch]][0] if stretch in parts else None for stretch in range(len(begins))]

        def there(matrix: Tensor) -> Tensor:
            spot = packed.spots[matrix]
            place = places[spot.stretch]
            assert place is not None, "a stretch with a matrix is not empty"
            return _seen_as(matrix, place[spot.offset : spot.offset + matrix.nbytes])

        last: dict[int, int] = {}
        for matrix, sites in adapter.matrices().items():
            for site in sites:
                last[site] = max(last.get(site, -1), parts[packed.spots[matrix].stretch])
        return replace(adapter.carried(there), coming=Coming(carrier.bring(copies), last))

    def _fitted(self, sizes: Sequence[int]) -> tuple[int, list[Spot]]:
        """The fewest pages that hold matrices of so many bytes in this order, and where each lies."""
        pages = max(1, -(-sum(sizes) // sum(self._widths)), -(-max(sizes) // max(self._widths)))
        while (spots := self._spots(sizes, pages)) is None:
            pages += 1
        return pages, spots

    def _spots(self, sizes: Sequence[int], pages: int) -> list[Spot] | None:
        # Where pages begin off the line, a stretch loses what is left of one.
        rooms = [(pages * width - (ALIGNED - 1 if width % ALIGNED else 0)) // ALIGNED * ALIGNED for width in self._widths]
        spots, stretch, at = [], 0, 0
        for size in sizes:
            while at + size > rooms[stretch]:
                stretch, at = stretch + 1, 0
                if stretch == len(rooms):
                    return None
            spots.append(Spot(stretch, at))
            at += size
        return spots


def _seen_as(matrix: Tensor, at: Tensor) -> Tensor:
    """Bytes as a matrix of the same kind."""
    return at.view(matrix.dtype).view(matrix.shape)
