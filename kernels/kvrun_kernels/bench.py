"""Runs every op's benchmark beside what this machine can do at all.

    python -m kvrun_kernels.bench [op ...] [--threads N] [--seconds S]

Each op's `bench.py` lists its cases. A case that is bound by memory is read against the stream rate, one that is bound
by arithmetic against a large matrix product of the same dtype; both limits are measured first, in the same run.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import kvrun_kernels

OPS = ("linear", "paged_attention", "sgmv", "rms_norm", "layer_norm", "rope", "store_kv", "act_mul")


@dataclass(frozen=True)
class Case:
    """One timed call: what it must read and write, what it must compute, and PyTorch's way to do the same, if any."""

    name: str
    run: Callable[[], object]
    bytes: float
    flops: float = 0.0
    beside: Callable[[], object] | None = None
    dtype: torch.dtype = torch.float32


def seconds_of(run: Callable[[], object], budget: float) -> float:
    """The median time of a call, over as many calls as the budget allows and at least three."""
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def stream_rate(budget: float) -> float:
    """Bytes per second read from memory: one packed weight far larger than any cache, times one row."""
    from kvrun_kernels import ops

    packed = ops.pack_linear(torch.ones(16384, 8192))
    x = torch.ones(1, 8192)
    return packed.nbytes / seconds_of(lambda: ops.linear(x, packed), budget)


def read_rate(budget: float) -> float:
    """Bytes per second that PyTorch's own sum reads."""
    ones = torch.ones(1 << 27)
    return ones.nbytes / seconds_of(ones.sum, budget)


def matmul_rate(dtype: torch.dtype, budget: float) -> float:
    """Floating-point operations per second of PyTorch's product of two square matrices."""
    a = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / seconds_of(lambda: a @ a, budget)


def cases(op: str) -> Iterator[Case]:
    return importlib.import_module(f"kvrun_kernels.{op}.bench").cases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=OPS, metavar="op", help=f"any of: {', '.join(OPS)}")
    parser.add_argument("--threads", type=int, default=kvrun_kernels.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    chosen = parser.parse_args()
    kvrun_kernels.set_num_threads(chosen.threads)
    torch.set_num_threads(chosen.threads)
    stream = max(stream_rate(chosen.seconds), read_rate(chosen.seconds))
    peaks = {dtype: matmul_rate(dtype, chosen.seconds) for dtype in (torch.float32, torch.bfloat16)}
    print(f"{chosen.threads} threads, {', '.join(sorted(set(kvrun_kernels.describe().values())))}")
    print(f"limits: stream {stream / 1e9:.1f} GB/s", *(f"{d} matmul {p / 1e9:.0f} GFLOP/s" for d, p in peaks.items()), sep=", ")
    print(f"{'case':52} {'us':>9} {'GB/s':>7} {'of limit':>8} {'GFLOP/s':>8} {'of limit':>8} {'x torch':>8}")
    for op in chosen.ops:
        for case in cases(op):
            took = seconds_of(case.run, chosen.seconds)
            beside = f"{seconds_of(case.beside, chosen.seconds) / took:8.2f}" if case.beside else f"{'':8}"
            peak = peaks.get(case.dtype, peaks[torch.float32])
            print(
                f"{op + ' ' + case.name:52} {took * 1e6:9.1f} {case.bytes / took / 1e9:7.1f} {case.bytes / took / stream:8.0%} "
                f"{case.flops / took / 1e9:8.0f} {case.flops / took / peak:8.0%} {beside}",
                flush=True,
            )


if __name__ == "__main__":
    main()
