"""What is under way between the host and a device: numbers that go either way beside what is computed, and moments of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Landing(Protocol[T_co]):
    """What was made on a device, on its way to the host."""

    @property
    def landed(self) -> bool:
        """Whether the host has it by now."""

    def wait(self) -> None:
        """Return when the host has it. Any thread may wait."""

    def get(self) -> T_co:
        """The same with all its tensors on the host; waits for them."""


class Mark(Protocol):
    """A moment in a device's work."""

    def since(self, earlier: Any) -> int:
        """Microseconds since an earlier one. Both must be over: what was fetched after them has landed."""


class Arrival(Protocol):
    """Copies on their way."""

    def wait(self, part: int) -> None:
        """Have what this thread computes next wait until copy `part` and those before it are done."""


class Arrived:
    """Copies that were done at once."""

    def wait(self, part: int) -> None:
        """See Arrival."""


@dataclass(frozen=True)
class Streamed:
    """Copies on a stream of their own."""

    index: int  # of the GPU
    done: Sequence[torch.cuda.Event]  # one for each copy

    def wait(self, part: int) -> None:
        """See Arrival."""
        torch.cuda.current_stream(self.index).wait_event(self.done[part])


@dataclass(frozen=True)
class Landed(Generic[T]):
    """What the host had from the first."""

    made: T
    landed = True

    def wait(self) -> None:
        """See Landing."""

    def get(self) -> T:
        """See Landing."""
        return self.made


@dataclass(frozen=True)
class Flight(Generic[T]):
    """What a GPU copies to pinned memory, which nobody may read before the event."""

    made: T
    event: torch.cuda.Event
    index: int

    @property
    def landed(self) -> bool:
        """See Landing."""
        return self.event.query()

    def wait(self) -> None:
        """See Landing."""
        torch.cuda.set_device(self.index)  # of this thread, which may be new to GPUs, and would set up the first of them
        self.event.synchronize()

    def get(self) -> T:
        """See Landing."""
        self.wait()
        return self.made


@dataclass(frozen=True)
class Instant:
    """A moment of the host."""

    ns: int

    def since(self, earlier: Instant) -> int:
        """See Mark."""
        return (self.ns - earlier.ns) // 1000


@dataclass(frozen=True)
class Passed:
    """A moment that a GPU comes to between two kernels."""

    event: torch.cuda.Event

    def since(self, earlier: Passed) -> int:
        """See Mark."""
        return int(earlier.event.elapsed_time(self.event) * 1e3)
