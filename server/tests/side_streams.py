"""Copies to a device that is not there, on streams of their own: one is made only when somebody waits for it, and no sooner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local

import streams
import torch

_thread = local()
MADE: list[int] = []  # at every wait, how many copies of its stream were made then


class SideStream:
    """torch.cuda.Stream"""

    def __init__(self, index: int = 0) -> None:
        self._given: list[Callable[[], object]] = []
        self._made = 0

    @property
    def length(self) -> int:
        """Copies that were ever given to it."""
        return len(self._given)

    def give(self, copy: Callable[[], object]) -> None:
        """Have a copy made after those before it."""
        self._given.append(copy)

    def wait_stream(self, other: Usual) -> None:
        """Nothing: what the usual stream is given is done at once."""

    def make(self, count: int) -> None:
        """Make its first copies, as far as they are not made yet."""
        with torch._C._DisableTorchDispatch():
            for copy in self._given[self._made : count]:
                copy()
        self._made = max(self._made, count)
        MADE.append(self._made)


class Event(streams.Event):
    """torch.cuda.Event, of the thread's own stream or of one beside it."""

    side: SideStream | None = None
    count = 0

    def record(self, stream: SideStream | None = None) -> None:
        """Pass when all has that the stream was given so far."""
        if stream is None:
            return super().record()
        self.side, self.count = stream, stream.length
        return None


class Usual:
    """What a thread computes on when it says nothing else."""

    def wait_event(self, event: Event) -> None:
        """Go on when an event has passed."""
        assert event.side is not None, "an event was waited for that nobody recorded"
        event.side.make(event.count)


def active() -> SideStream | None:
    """The stream that this thread gives its copies to; None = they are made at once."""
    return getattr(_thread, "stream", None)


@contextmanager
def on(stream: SideStream) -> Iterator[None]:
    """torch.cuda.stream"""
    _thread.stream = stream
    try:
        yield
    finally:
        _thread.stream = None


# What torch.cuda says and does.
SAID = {"Stream": SideStream, "Event": Event, "current_stream": lambda index=None: Usual(), "stream": on}
