"""Every op's Triton code compiles for GPUs that are not here, at the sizes of real models and within what a processor of theirs holds.

Triton and its assembler need no device for that. Run by itself, this file prints what each kernel takes: `python test_compiled.py 90`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[1]
# Bytes of shared memory that one program may have: A100, the consumer cards of its generation, H100.
SHARED = {80: 166_912, 86: 101_376, 90: 232_448}


def calls(ops, dtype: torch.dtype) -> Iterator[tuple[str, object]]:
    """Each op at the sizes of an 8B model, as (its folder, something that calls it)."""

    def rows(n: int, width: int) -> torch.Tensor:
        return torch.zeros(n, width, dtype=dtype)

    yield "rms_norm", lambda: ops.rms_norm(rows(4, 4096), torch.ones(4096, dtype=dtype), 1e-5)
    codes, scales = torch.zeros(4096, 4096, dtype=torch.uint8), torch.ones(4096, 32, dtype=torch.float16)
    weights = (
        ops.pack_quantized(codes, scales, group=128),
        ops.pack_quantized(codes, scales.repeat(1, 4), scales.repeat(1, 4).to(torch.int8), group=32),
        ops.pack_quantized(codes.to(torch.int8), scales[:, :1].float()),
        ops.pack_quantized(codes.to(torch.float8_e4m3fn), scales[:, :1].float()),
        ops.pack_quantized(codes, scales, group=128, table=torch.linspace(-1, 1, 16) ** 3),
        ops.pack_quantized(codes, scales.repeat(1, 16), scales.repeat(1, 16), group=8),
    )
    for packed in weights:
        for n in (1, 16, 64, 512):
            yield "quantized_linear", lambda packed=packed, n=n: ops.quantized_linear(rows(n, 4096), packed)


def compile_all(capability: int) -> None:
    """Print a line for each kernel that the calls above launch: op, kernel, registers, bytes of shared memory, bytes spilled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from kvrun_kernels import dispatch, ops

    class Absent:
        """A device that is only compiled for."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    driver.set_active(Absent())
    dispatch._triton_devices = frozenset({"cpu"})
    op, seen = "", set()

    def launch(self, grid):
        def compiled(*args, **options):
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            if kernel.hash in seen:
                return
            seen.add(kernel.hash)
            path = Path(os.environ["CUBIN"])
            path.write_bytes(kernel.asm["cubin"])
            dump = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run([dump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
            registers, stack = (int(found) for found in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
            print(op, self.fn.__name__, registers, kernel.metadata.shared, stack, flush=True)

        return compiled

    JITFunction.__getitem__ = launch
    for dtype in (torch.bfloat16,):
        for op, call in calls(ops, dtype):  # noqa: B007
            call()


@pytest.mark.parametrize("capability", (80, 90))
def test_every_kernel_compiles_and_fits(capability, tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUBIN": str(tmp_path / "cubin"), "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, __file__, str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert {op for op, *_ in found} == {path.parent.name for path in KERNELS.glob("kvrun_kernels/*/triton.py")}
    for op, kernel, _, shared, spilled in found:
        assert int(shared) <= SHARED[capability] and int(spilled) < 64, (op, kernel, shared, spilled)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
