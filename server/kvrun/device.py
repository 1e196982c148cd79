"""Where a shard computes: the host's processors or one GPU of it. Whatever a device decides is decided here; all others are handed one.

Batches are made on the host. `take` brings one to where the model lies, in a single copy; `fetch` has what was made there come
back while the host goes on.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import kvrun_kernels
import torch
from kvrun_kernels.quantized_linear.scaled import CAPABILITIES
from torch import Tensor

from kvrun.errors import DeviceError, Unsupported
from kvrun.underway import Arrival, Arrived, Flight, Instant, Landed, Landing, Mark, Passed, Streamed

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
log = logging.getLogger("kvrun.device")

ABLE = {"cpu": "the kernels for CPUs", "cuda": "GPUs"}
CGROUP_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
LINE = 16  # bytes, of the widest load: every tensor of a copy begins at a multiple of it
BFLOAT16 = (8, 0)  # the first compute capability whose tensor cores multiply bfloat16


class Device(Protocol):
    """What the rest of a shard may ask of the place it computes at."""

    @property
    def place(self) -> torch.device:
        """Where tensors of the model lie."""

    @property
    def shared(self) -> bool:
        """Whether all ranks of a group divide its memory among them."""

    @property
    def captures(self) -> bool:
        """Whether steps are captured before the first of them, rather than recorded as they come."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability of a GPU; None of a CPU."""

    def suited(self, dtype: torch.dtype, magnitude: float) -> torch.dtype:
        """What to compute a model in whose checkpoint has this dtype and whose hidden states reach `magnitude`, if nobody said."""

    @property
    def narrow(self) -> tuple[str, ...]:
        """What --activation-dtype may have quantized weights multiplied with here, beside the model's own numbers."""

    def free_bytes(self) -> int:
        """Bytes that this process may still take."""

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Bytes that `run` takes at its most beside what is taken already; None where memory is shared with others. It is run."""

    def reclaim(self) -> None:
        """Give back the memory that this process keeps without using it."""

    def begin(self) -> None:
        """Have this thread compute here. Call it before anything is."""

    def take(self, made: T) -> T:
        """A dataclass whose tensors were made on the host, and those of its dataclasses, with all of them on this device."""

    def fetch(self, made: T) -> Landing[T]:
        """A dataclass whose tensors were made here, and those of its dataclasses, on its way to the host once all work before is done."""

    def mark(self) -> Mark:
        """The moment when all work before is done."""

    def staged(self, size: int) -> Tensor:
        """Bytes of the host's that `bring` carries here while the host goes on, [size] uint8."""

    def bring(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Arrival:
        """Begin to copy to each place here what was staged for it, one after another, beside what is computed from now on."""

    def describe(self) -> str:
        """Its name and its memory, for people."""


@dataclass(frozen=True)
class Cpu:
    """The host's processors, which read a batch where it was made."""

    place = torch.device("cpu")
    shared = True
    capability = None
    captures = False
    narrow = ("int8",)

    def suited(self, dtype: torch.dtype, magnitude: float) -> torch.dtype:
        """The checkpoint's own."""
        return dtype

    def free_bytes(self) -> int:
        """See Device."""
        return available_bytes()

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """None, and nothing is run: what is free here is anybody's."""
        return None

    def reclaim(self) -> None:
        """Nothing is kept."""

    def begin(self) -> None:
        """Nothing: every thread does."""

    def take(self, made: T) -> T:
        """The same."""
        return made

    def fetch(self, made: T) -> Landing[T]:
        """The same."""
        return Landed(made)

    def mark(self) -> Mark:
        """Now."""
        return Instant(time.perf_counter_ns())

    def staged(self, size: int) -> Tensor:
        """See Device."""
        return torch.empty(size, dtype=torch.uint8)

    def bring(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Arrived:
        """See Device. They are done when this returns."""
        for to, given in copies:
            to.copy_(given)
        return Arrived()

    def describe(self) -> str:
        """See Device."""
        threads = kvrun_kernels.get_num_threads()
        return f"the CPU, {threads} thread{'s' * (threads > 1)} on processors {processors()}, {self.free_bytes() / 2**30:.1f} GiB free"


@dataclass(frozen=True)
class Cuda:
    """One GPU, by its number among those that this process sees."""

    index: int
    fraction: float = 1.0  # of its memory that this process may take
    shared = False
    captures = True

    @property
    def place(self) -> torch.device:
        """See Device."""
        return torch.device("cuda", self.index)

    @property
    def capability(self) -> tuple[int, int]:
        """See Device."""
        return torch.cuda.get_device_capability(self.index)

    @property
    def narrow(self) -> tuple[str, ...]:
        """See Device."""
        first, beyond = CAPABILITIES
        return ("fp8",) if first <= torch.cuda.get_device_capability(self.index) < beyond else ()

    def begin(self) -> None:
        """Have this thread compute here, and the process within the fraction."""
        torch.cuda.set_device(self.index)
        torch.cuda.set_per_process_memory_fraction(self.fraction, self.index)

    def suited(self, dtype: torch.dtype, magnitude: float) -> torch.dtype:
        """A type of 16 bits that its tensor cores multiply, and that the model's hidden states fit into."""
        if dtype == torch.float16:
            return dtype
        if torch.cuda.get_device_capability(self.index) >= BFLOAT16:
            return torch.bfloat16
        return torch.float16 if magnitude <= torch.finfo(torch.float16).max else torch.float32

    def free_bytes(self) -> int:
        """What the device has left, and what this process keeps for itself without using it, within its fraction."""
        free, total = torch.cuda.mem_get_info(self.index)
        held = torch.cuda.memory_reserved(self.index)
        return max(0, min(free + held, int(total * self.fraction)) - torch.cuda.memory_allocated(self.index))

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """See Device."""
        self.reclaim()
        torch.cuda.reset_peak_memory_stats(self.index)
        before = torch.cuda.memory_allocated(self.index)
        run()
        torch.cuda.synchronize(self.index)
        return max(0, torch.cuda.max_memory_allocated(self.index) - before)

    def reclaim(self) -> None:
        """See Device."""
        gc.collect()  # a failed step's tensors may hang in a cycle of its error
        torch.cuda.empty_cache()

    def take(self, made: T) -> T:
        """See Device. The host does not wait for the copy; nothing may write to what was given until the step is done."""
        here = [tensor for tensor in _tensors(made) if tensor.is_cpu]
        staged, places = _pinned(here)
        for place, tensor in zip(places, here, strict=True):
            place.copy_(tensor)
        return _replaced(made, iter(_laid(staged.to(self.place, non_blocking=True), here)), of_host=True)

    def fetch(self, made: T) -> Landing[T]:
        """See Device."""
        there = [tensor for tensor in _tensors(made) if not tensor.is_cpu]
        _, places = _pinned(there)
        for place, tensor in zip(places, there, strict=True):
            place.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record()
        return Flight(_replaced(made, iter(places), of_host=False), event, self.index)

    def mark(self) -> Mark:
        """See Device."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Passed(event)

    def staged(self, size: int) -> Tensor:
        """See Device."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def bring(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Streamed:
        """See Device. They begin when all is done that was given to the GPU before: that may still use these places."""
        side, done = torch.cuda.Stream(self.index), []
        side.wait_stream(torch.cuda.current_stream(self.index))
        with torch.cuda.stream(side):
            for to, given in copies:
                to.copy_(given, non_blocking=True)
                done.append(torch.cuda.Event())
                done[-1].record(side)
        return Streamed(self.index, done)

    def describe(self) -> str:
        """See Device."""
        major, minor = torch.cuda.get_device_capability(self.index)
        name = torch.cuda.get_device_name(self.index)
        return f"{self.place}, {name}, compute capability {major}.{minor}, {self.free_bytes() / 2**30:.1f} GiB free"


def choose(asked: str, rank: int, fraction: float = 1.0) -> Cpu | Cuda:
    """The device of a rank: "cpu", "cuda" for the GPU of its number, "auto" for a GPU where there is one. Raises DeviceError."""
    found = torch.cuda.device_count() if asked != "cpu" and torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and not found):
        return Cpu()
    if rank >= found:
        why = "sees no GPU that PyTorch can use" if not found else f"sees {found}, numbered from 0"
        cure = "check the driver and CUDA_VISIBLE_DEVICES, lower --num-shard, or use --device cpu"
        raise DeviceError(f"rank {rank} was to compute on cuda:{rank}, and this process {why}; {cure}")
    return Cuda(rank, fraction)


def serving(device: Device, strict: bool = False) -> dict[str, str]:
    """What serves each op on a device. `strict`: raises DeviceError where that is an op's plain reference."""
    kernels = kvrun_kernels.describe(device.place.type)
    slow = [op for op, server in kernels.items() if server == "reference"]
    if strict and slow:
        cure = "build native.so" if device.place.type == "cpu" else "install triton"
        raise DeviceError(f"--strict-kernels: on {device.place}, {', '.join(slow)} would be left to plain PyTorch; {cure} or leave it out")
    return kernels


def announce(device: Device, kernels: Mapping[str, str], activation_dtype: str) -> None:
    """Say in the log where this rank computes, what serves which op, and what quantized weights are multiplied with."""
    by_server: dict[str, list[str]] = {}
    for op, server in kernels.items():
        by_server.setdefault(server, []).append(op)
    served = "; ".join(f"{server}: {', '.join(ops)}" for server, ops in sorted(by_server.items()))
    told = {"device": str(device.place), "kernels": served, "activation_dtype": activation_dtype}
    log.info("computes on %s", device.describe(), extra={"fields": told})


def refuse_unless(kind: str, device: Device, asked: dict[str, bool]) -> None:
    """Raises Unsupported for what was asked of a device and only those of another kind do, by its flag. kind: of ABLE"""
    named = [flag for flag, is_set in asked.items() if is_set]
    if named and device.place.type != kind:
        raise Unsupported(f"{', '.join(named)} was asked for on {device.place}, and only {ABLE[kind]} do that; leave it out")


def available_bytes(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that this process may still take without swapping or meeting its container's limit."""
    lines = dict(line.split(":", 1) for line in proc.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit_name, usage_name in CGROUP_LIMITS:
        try:
            limit, usage = (cgroup / limit_name).read_text().strip(), (cgroup / usage_name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            free = min(free, max(int(limit) - int(usage), 0))
    return free


def processors(status: Path = Path("/proc/self/status")) -> str:
    """Those that this process may run on, as the kernel lists them: "0-3,8"."""
    return next(line for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list:")).split()[1]


def _tensors(made: Any) -> Iterator[Tensor]:
    """The tensors of a dataclass and of the dataclasses in it, in the order of the fields."""
    for field in fields(made):
        value = getattr(made, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _replaced(made: T, moved: Iterator[Tensor], *, of_host: bool) -> T:
    """The same dataclass with the next of `moved` for every tensor of the host, or for every other."""
    changed: dict[str, Any] = {}
    for field in fields(made):  # type: ignore[arg-type]
        value = getattr(made, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = next(moved) if value.is_cpu == of_host else value
        elif is_dataclass(value):
            changed[field.name] = _replaced(value, moved, of_host=of_host)
    return replace(made, **changed)  # type: ignore[type-var]


def _pinned(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A block of pinned memory, and places in it for all of these.

    Such blocks come from PyTorch's cache of them, which gives a block again only when the copies out of it or into it are done.
    """
    block = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=True)
    return block, _laid(block, tensors)


def _laid(block: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of a block of bytes, one after another, of the dtypes and shapes of `tensors`."""
    starts = accumulate(map(_room, tensors), initial=0)
    return [block[start : start + t.nbytes].view(t.dtype).view(t.shape) for start, t in zip(starts, tensors)]


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // LINE) * LINE
