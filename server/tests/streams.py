"""Order in time on a device that is not there: what it copies to the host comes when somebody waits for it, and every wait is noted.

Each thread computes on a stream of its own. Work is done as it is launched, but what a copy carries is seen by the host, which
would find other numbers until then, only after an event behind it was waited for. What makes the host wait otherwise, as a
copy that is not asked to be asynchronous, or one from or to memory that is not pinned, is noted in WAITS.
"""

from __future__ import annotations

import time
from threading import Lock, local
from typing import Any

import graphs
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

aten = torch.ops.aten
UNSEEN = 0xA5  # every byte of what has not come yet

WAITS: list[str] = []  # what has waited for the device, but for events
_pinned: dict[int, StorageWeakRef] = {}
_thread = local()


class Stream:
    """The copies of one thread, each before an event."""

    def __init__(self) -> None:
        self._lock, self._copies, self._recorded, self.reached = Lock(), list[tuple[int, Tensor, Tensor]](), 0, 0

    def copy(self, to: Tensor, numbers: Tensor) -> None:
        """Have the host find these numbers, as they are now, behind the next event."""
        if to.numel():
            to.view(torch.uint8).fill_(UNSEEN)
        with self._lock:
            self._copies.append((self._recorded, to, numbers.clone()))

    def record(self) -> int:
        """The number of an event behind all that was launched."""
        with self._lock:
            self._recorded += 1
            return self._recorded

    @torch.inference_mode()
    def reach(self, event: int) -> None:
        """Do all that is before an event."""
        with self._lock:
            for before, to, numbers in self._copies:
                if before < event:
                    to.copy_(numbers)
            self._copies = [copy for copy in self._copies if copy[0] >= event]
            self.reached = max(self.reached, event)


class Event:
    """torch.cuda.Event"""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._timed, self._stream, self._number = enable_timing, current(), 0

    def record(self) -> None:
        self._stream, self._at = current(), time.perf_counter()
        self._number = self._stream.record()

    def query(self) -> bool:
        return self._stream.reached >= self._number

    def synchronize(self) -> None:
        self._stream.reach(self._number)

    def elapsed_time(self, end: Event) -> float:
        assert self._timed and end._timed and self.query() and end.query(), "events are read once they have passed"
        return (end._at - self._at) * 1e3


def current() -> Stream:
    """This thread's."""
    if not hasattr(_thread, "stream"):
        _thread.stream = Stream()
    return _thread.stream


def pin(made: Tensor) -> None:
    """Take memory for pinned."""
    storage = made.untyped_storage()
    _pinned[storage._cdata] = StorageWeakRef(storage)


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor of the host lies in such memory."""
    held = _pinned.get(tensor.untyped_storage()._cdata)
    return held is not None and not held.expired()


def note(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], host: Tensor | None) -> bool:
    """Whether an operator over tensors of the device lets the host go on; what does not is noted. host: what a copy meets there"""
    if host is None and not graphs.waits(func, args):
        return True
    asynchronous = kwargs.get("non_blocking", len(args) > 2 and func is aten.copy_.default and args[2])
    if host is not None and asynchronous and is_pinned(host):
        return True
    WAITS.append(str(func))
    return False
