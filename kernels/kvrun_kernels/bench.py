"""Runs every op's benchmark beside what this machine can do at all.

    python -m kvrun_kernels.bench [op ...] [--threads N] [--seconds S] [--cpu-time | --device cuda]

Each op's `bench.py` lists its cases. A case that is bound by memory is read against the stream rate, one that is bound
by arithmetic against a large matrix product of the same dtype; both limits are measured first, in the same run. Where
others use the machine too, `--cpu-time` counts the processor time of one thread, which waiting for a turn does not add to.
With `--device cuda` all of it is measured on a GPU, from the call to the end of what it started there.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

import kvrun_kernels

OPS = (
    "linear", "quantized_linear", "grouped_linear", "grouped_quantized_linear", "paged_attention", "sgmv", "rms_norm", "layer_norm", "rope",
    "store_kv", "act_mul", "add", "causal_conv", "selective_scan", "ssd_scan",
    "quantize", "pack_panels",
)  # fmt: skip

# Sides of the matrices whose product is the limit of arithmetic.
MATMUL, MATMUL_ON_GPU = 2048, 8192

# (outputs, inputs) of every linear that a step of a model of 1.1 billion parameters multiplies with: more than any cache holds.
STEP = ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632)) * 22 + ((32000, 2048),)


@dataclass(frozen=True)
class Case:
    """One timed call: what it must read and write, what it must compute, and PyTorch's way to do the same, if any."""

    name: str
    run: Callable[[], object]
    bytes: float
    flops: float = 0.0
    beside: Callable[[], object] | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Clock:
    """How calls are timed: for about how long, and by which hands."""

    budget: float
    now: Callable[[], float] = time.perf_counter
    done: Callable[[], object] = lambda: None  # returns when what runs beside the host is finished

    def seconds_of(self, run: Callable[[], object]) -> float:
        """The median time of a call, over as many calls as the budget allows and at least three."""
        run()
        self.done()
        times: list[float] = []
        end = self.now() + self.budget
        while len(times) < 3 or (self.now() < end and len(times) < 1000):
            start = self.now()
            run()
            self.done()
            times.append(self.now() - start)
        return sorted(times)[len(times) // 2]


def stream_rate(clock: Clock) -> float:
    """Bytes per second read from memory: one packed weight far larger than any cache, times one row."""
    from kvrun_kernels import ops

    packed = ops.pack_linear(torch.ones(16384, 8192))
    x = torch.ones(1, 8192)
    return packed.nbytes / clock.seconds_of(lambda: ops.linear(x, packed))


def read_rate(clock: Clock) -> float:
    """Bytes per second that PyTorch's own sum reads."""
    ones = torch.ones(1 << 27)
    return ones.nbytes / clock.seconds_of(ones.sum)


def matmul_rate(dtype: torch.dtype, clock: Clock, side: int) -> float:
    """Floating-point operations per second of PyTorch's product of two square matrices."""
    a = torch.randn(side, side).to(dtype)
    return 2 * side**3 / clock.seconds_of(lambda: a @ a)


def cases(op: str) -> Iterator[Case]:
    return importlib.import_module(f"kvrun_kernels.{op}.bench").cases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=OPS, metavar="op", help=f"any of: {', '.join(OPS)}")
    parser.add_argument("--threads", type=int, default=kvrun_kernels.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, timed by its processor time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    threads = 1 if chosen.cpu_time else chosen.threads
    on_gpu = chosen.device == "cuda"
    if on_gpu and (chosen.cpu_time or not torch.cuda.is_available()):
        parser.error("--device cuda needs a GPU that PyTorch can use, and its time is not the processor's")
    clock = Clock(
        chosen.seconds,
        time.thread_time if chosen.cpu_time else time.perf_counter,
        torch.cuda.synchronize if on_gpu else lambda: None,
    )
    kvrun_kernels.set_num_threads(threads)
    torch.set_num_threads(threads)
    with torch.inference_mode(), torch.device(chosen.device):
        measure(chosen.ops, clock, MATMUL_ON_GPU if on_gpu else MATMUL, chosen.device, threads)


def measure(ops: Iterable[str], clock: Clock, side: int, device: str, threads: int) -> None:
    """Print the limits, then each case beside them."""
    stream = max(stream_rate(clock), read_rate(clock))
    peaks = {dtype: matmul_rate(dtype, clock, side) for dtype in (torch.float32, torch.bfloat16)}
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} threads"
    print(f"{where}, {', '.join(sorted(set(kvrun_kernels.describe(device).values())))}")
    print(f"limits: stream {stream / 1e9:.1f} GB/s", *(f"{d} matmul {p / 1e9:.0f} GFLOP/s" for d, p in peaks.items()), sep=", ")
    print(f"{'case':52} {'us':>9} {'GB/s':>7} {'of limit':>8} {'GFLOP/s':>8} {'of limit':>8} {'x torch':>8}")
    for op in ops:
        for case in cases(op):
            took = clock.seconds_of(case.run)
            beside = f"{clock.seconds_of(case.beside) / took:8.2f}" if case.beside else f"{'':8}"
            peak = peaks.get(case.dtype, peaks[torch.float32])
            print(
                f"{op + ' ' + case.name:52} {took * 1e6:9.1f} {case.bytes / took / 1e9:7.1f} {case.bytes / took / stream:8.0%} "
                f"{case.flops / took / 1e9:8.0f} {case.flops / took / peak:8.0%} {beside}",
                flush=True,
            )


if __name__ == "__main__":
    main()
