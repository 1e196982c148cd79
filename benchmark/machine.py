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

    def measure(self) -> dict[str, float]:
        """Bytes and floating-point operations per second, by the name they have in the table."""
        from kvrun_kernels.bench import matmul_rate

        torch, ops = self.torch, self.ops
        stream = self.packed.nbytes / self.clock.seconds_of(lambda: ops.linear(self.row, self.packed))
        read = self.summed.nbytes / self.clock.seconds_of(self.summed.sum)
        square = ops.pack_linear(torch.ones(2048, 2048, dtype=torch.bfloat16))
        rows = torch.ones(512, 2048, dtype=torch.bfloat16)
        own = 2 * 512 * 2048**2 / self.clock.seconds_of(lambda: ops.linear(rows, square))
        products = {dtype: matmul_rate(dtype, self.clock) for dtype in (torch.float32, torch.bfloat16)}
        return {"read": max(stream, read), "float32": products[torch.float32], "bfloat16": products[torch.bfloat16], "kernel": own}


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
