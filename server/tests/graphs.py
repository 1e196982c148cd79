"""CUDA graphs of a device that is not there: what a thread computes between two moments, made again over the very same memory.

It holds to what a GPU holds to: a graph knows addresses and keeps alive only what it made itself, all of which the next replay of
any graph of its pool destroys; nothing may wait for the device, carry numbers from or to the host, or have another size again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CARRIERS = {aten._to_copy.default, aten.copy_.default}
# What takes memory and computes nothing.
EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default}
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NotCapturable(RuntimeError):
    """A capture met what no graph can hold."""


class Stale(RuntimeError):
    """A replay met memory that was given back since the capture."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, without keeping it there."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, t: Tensor) -> Place:
        return cls(StorageWeakRef(t.untyped_storage()), t.dtype, tuple(t.shape), t.stride(), t.storage_offset())

    def now(self) -> Tensor:
        """What lies there."""
        if self.storage.expired():
            raise Stale(f"a tensor {list(self.size)} of {self.dtype} that a graph reads or writes is gone")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Pool:
    """The memory of graphs that share it."""

    def __init__(self) -> None:
        self.held: dict[int, torch.UntypedStorage] = {}

    def destroy(self) -> None:
        """Fill it with what is no number."""
        for storage in self.held.values():
            storage.fill_(0xFF)


class Graph:
    """torch.cuda.CUDAGraph"""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.pool = Pool()
        self.replays = 0
        GRAPHS.append(self)

    def replay(self) -> None:
        """Make again what was captured."""
        self.replays += 1
        with torch._C._DisableTorchDispatch():
            self.pool.destroy()
            for call in self.calls:
                call()

    def note(self, run: Callable[..., Any], args: Any, kwargs: Any, there: set[int], made: Any = None) -> None:
        """A call that just ran, on tensors of the host; those of `there`, by id, stand for the device's."""
        placed = tree_map_only(Tensor, lambda t: Place.of(t) if id(t) in there else t, (args, kwargs))
        results = [self._kept(result) for result in tree_leaves(made) if isinstance(result, Tensor)]

        def again() -> None:
            args, kwargs = tree_map_only(Place, Place.now, placed)
            now = [result for result in tree_leaves(run(*args, **kwargs)) if isinstance(result, Tensor)]
            for place, result in zip(results, now):
                if place is not None and place.size != tuple(result.shape):
                    raise NotCapturable(f"{run} made {list(result.shape)}, and {list(place.size)} when it was captured")
                if place is not None:
                    place.now().copy_(result)

        self.calls.append(again)

    def op(self, func: Any, args: Any, kwargs: Any, there: set[int], made: Any) -> None:
        """An operator of PyTorch that just ran."""
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given]
        for tensor in fresh:
            self.pool.held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        if func not in EMPTY and (fresh or func._schema.is_mutable):
            self.note(func, args, kwargs, there, fresh)

    def _kept(self, result: Tensor) -> Place | None:
        return Place.of(result) if result.untyped_storage()._cdata in self.pool.held else None


GRAPHS: list[Graph] = []
_thread = local()


def active() -> Graph | None:
    """The graph that this thread captures."""
    return getattr(_thread, "graph", None)


@contextmanager
def capturing(graph: Graph, pool: Pool | None = None, capture_error_mode: str = "global") -> Iterator[None]:
    """torch.cuda.graph"""
    assert active() is None, "a thread captures one graph at a time"
    graph.pool = pool or graph.pool
    _thread.graph = graph
    try:
        yield
    finally:
        _thread.graph = None


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host reads numbers of an operator's tensors, be it for the shape of what it makes."""
    if func is aten.is_nonzero.default:  # not marked
        return True
    numbered = func is aten.index.Tensor and not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return bool(WAITING & set(func.tags)) and not numbered


def check(func: Any, args: tuple[Any, ...], crosses: bool) -> None:
    """Raise for an operator that a capture cannot hold."""
    if active() is None:
        return
    if waits(func, args):
        raise NotCapturable(f"{func} waits for the device")
    if crosses:
        raise NotCapturable(f"{func} carries numbers between the device and the host")


def no_waiting(what: str) -> None:
    """Raise where a capture would have to end."""
    if active() is not None:
        raise NotCapturable(f"{what} waits for the device")


class Meter:
    """Bytes of the device's tensors that were made since `reset`: those that are still there, and the most that ever were."""

    def __init__(self) -> None:
        self.on, self.peak = False, 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def reset(self) -> None:
        """Begin to count."""
        self.on, self.peak, self._live = True, 0, {}

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's memory."""
        storage = tensor.untyped_storage()
        if self.on and storage._cdata not in self._live:
            self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.peak = max(self.peak, self.now())

    def know(self, tensors: Iterable[Tensor]) -> None:
        """What is made of these in their place, or is a part of them, takes no memory: they were there before."""
        for storage in (tensor.untyped_storage() for tensor in tensors if self.on):
            self._live.setdefault(storage._cdata, (StorageWeakRef(storage), 0))

    def now(self) -> int:
        """Bytes that are there."""
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        return sum(size for _, size in self._live.values())

    def most(self) -> int:
        """The peak, and the end of counting."""
        self.on = False
        return self.peak


METER = Meter()
# What torch.cuda says and does.
SAID = {
    "CUDAGraph": Graph,
    "graph": capturing,
    "graph_pool_handle": Pool,
    "empty_cache": lambda: no_waiting("torch.cuda.empty_cache"),
    "synchronize": lambda index=None: no_waiting("torch.cuda.synchronize"),
    "reset_peak_memory_stats": lambda index: METER.reset(),
    "memory_allocated": lambda index: METER.now(),
    "max_memory_allocated": lambda index: METER.most(),
}
