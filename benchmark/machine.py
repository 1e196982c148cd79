"""What this machine can do at all: the rates that every figure is a share of, and what to call the machine in a table."""

import os
import platform
import time
from pathlib import Path


class Limits:
    """The best read rate and the best matrix product, measured anew each time it is asked.

    Bytes per second: the larger one of streaming a packed weight of 512 MiB through the kernel and of PyTorch's sum over as much.
    Operations per second: the largest of PyTorch's product of two matrices of 2048 in float32 and in bfloat16, and of the
    kernel's 512 rows in bfloat16.
    """

    def __init__(self, threads: int, seconds: float = 0.4):
        import kvrun_kernels
        import torch
        from kvrun_kernels import ops
        from kvrun_kernels.bench import Clock

        kvrun_kernels.set_num_threads(threads)
        torch.set_num_threads(threads)
        self.clock = Clock(seconds)
        self.torch, self.ops = torch, ops
        self.packed, self.row = ops.pack_linear(torch.ones(16384, 8192)), torch.ones(1, 8192)
        self.summed = torch.ones(1 << 27)

    def read(self) -> float:
        """Bytes per second."""
        stream = self.packed.nbytes / self.clock.seconds_of(lambda: self.ops.linear(self.row, self.packed))
        return max(stream, self.summed.nbytes / self.clock.seconds_of(self.summed.sum))

    def products(self) -> dict[str, float]:
        """Operations per second of each kind of product."""
        from kvrun_kernels.bench import matmul_rate

        torch, ops = self.torch, self.ops
        square = ops.pack_linear(torch.ones(2048, 2048, dtype=torch.bfloat16))
        rows = torch.ones(512, 2048, dtype=torch.bfloat16)
        own = 2 * 512 * 2048**2 / self.clock.seconds_of(lambda: ops.linear(rows, square))
        return {"kernel": own} | {str(d).removeprefix("torch."): matmul_rate(d, self.clock, 2048) for d in (torch.float32, torch.bfloat16)}


def cores() -> int:
    return len(os.sched_getaffinity(0))


def describe() -> str:
    """Processor, cores, memory, what the kernels chose, and the day."""
    import kvrun_kernels

    facts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in facts)}
    model = names.get("model name", platform.processor())
    kind = f" (family {names['cpu family']}, model {names['model']})" if "cpu family" in names else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    chosen = ", ".join(sorted(set(kvrun_kernels.describe().values())))
    return f"{model}{kind}, {cores()} cores, {memory:.0f} GiB, kernels at {chosen}, {time.strftime('%Y-%m-%d %H:%M')}"
