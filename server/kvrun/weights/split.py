"""Who of a group of ranks holds which heads, feed-forward units and vocabulary rows. Pure arithmetic, nothing has to divide."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvrun.errors import Unsupported

Span = tuple[int, int]  # [start, stop)
Runs = tuple[Span, ...]  # ranges in the order they are laid down


def merge(runs: Iterable[Span]) -> Runs:
    """The same indices in the same order, empty ranges dropped and adjoining ones joined."""
    merged: list[Span] = []
    for start, stop in runs:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def part(runs: Runs, start: int, stop: int) -> Runs:
    """The indices from `start` to `stop`, counted in the order in which the ranges hold them."""
    found, before = [], 0
    for first, last in runs:
        found.append((first + max(start - before, 0), min(first + stop - before, last)))
        before += last - first
    return tuple((first, last) for first, last in found if first < last)


def size(runs: Runs) -> int:
    """How many indices the ranges hold."""
    return sum(stop - start for start, stop in runs)


@dataclass(frozen=True)
class HeadShare:
    """The query heads of one rank and the key/value heads they read, whole groups or a part of one group."""

    query: Span
    kv: Span

    @property
    def heads(self) -> int:
        """How many query heads."""
        return self.query[1] - self.query[0]

    @property
    def kv_heads(self) -> int:
        """How many key/value heads."""
        return self.kv[1] - self.kv[0]


@dataclass(frozen=True)
class Split:
    """One rank's share of everything."""

    rank: int = 0
    world: int = 1
    unit: int = 1  # what `units` keeps together: the values that a weight format packs or scales together

    def units(self, total: int) -> Span:
        """As `span`, in multiples of the unit, or of a half, quarter ... of it when ranks would go empty."""
        unit = self.unit
        while unit > 1 and total < unit * self.world:
            unit //= 2
        start, stop = _share(-(-total // unit), self.world, self.rank)
        return min(start * unit, total), min(stop * unit, total)

    def span(self, total: int) -> Span:
        """This rank's share of `total` units; the first ranks hold one more where it does not divide."""
        return _share(total, self.world, self.rank)

    def sizes(self, total: int) -> tuple[int, ...]:
        """How many of `total` units each rank holds."""
        return tuple(stop - start for start, stop in (_share(total, self.world, rank) for rank in range(self.world)))

    def heads(self, heads: int, kv_heads: int) -> HeadShare:
        """This rank's heads. With fewer key/value heads than ranks, several ranks share one and split its query heads.

        So a rank's query heads divide evenly over its key/value heads, which the attention kernels rely on.
        """
        if heads % kv_heads:
            raise Unsupported(f"{heads} query heads do not divide over {kv_heads} key/value heads; the config is wrong")
        if self.world > heads:
            raise Unsupported(f"{heads} attention heads cannot be split over {self.world} ranks; use at most {heads} (--num-shard)")
        group = heads // kv_heads
        if self.world <= kv_heads:
            start, stop = self.span(kv_heads)
            return HeadShare((start * group, stop * group), (start, stop))
        for kv in range(kv_heads):
            first, last = _share(self.world, kv_heads, kv)
            if first <= self.rank < last:
                start, stop = _share(group, last - first, self.rank - first)
                return HeadShare((kv * group + start, kv * group + stop), (kv, kv + 1))
        raise ValueError(f"rank {self.rank} is not below {self.world}")


def _share(total: int, world: int, rank: int) -> Span:
    each, rest = divmod(total, world)
    start = rank * each + min(rank, rest)
    return start, start + each + (rank < rest)
