"""Every op's Triton code compiles for GPUs that are not here, at the sizes of real models and within what a processor of theirs holds.

Triton and its assembler need no device for that. Run by itself, this file prints what each kernel takes:
`python test_compiled.py 80 paged_attention` for an A100 and one op.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvrun_kernels.stored import stored_width

KERNELS = Path(__file__).resolve().parents[1]
# Bytes of shared memory that one program may have on an H100.
SHARED = 232_448


def calls(ops, dtype: torch.dtype) -> Iterator[tuple[str, object]]:
    """Each op at the sizes of an 8B model, as (its folder, something that calls it)."""

    def rows(n: int, width: int) -> torch.Tensor:
        return torch.zeros(n, width, dtype=dtype)

    def whole(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    yield "rms_norm", lambda: ops.rms_norm(rows(4, 4096), rows(1, 4096)[0], 1e-5)
    yield "layer_norm", lambda: ops.layer_norm(rows(4, 4096), rows(1, 4096)[0], rows(1, 4096)[0], 1e-5)
    yield "act_mul", lambda: ops.act_mul(rows(4, 28672), "silu")
    angles = torch.zeros(128, 64)
    yield "rope", lambda: ops.rope_(rows(4, 4096).view(4, 32, 128), rows(4, 1024).view(4, 8, 128), whole(0, 1, 2, 3), angles, angles)
    carried = (whole(0, 4), whole(0), torch.ones(1, dtype=torch.bool))
    yield "causal_conv", lambda: ops.causal_conv(rows(4, 4096), rows(4096, 4), None, *carried, torch.zeros(1, 4096, 3), "silu")
    yield "selective_scan", lambda: ops.selective_scan(
        rows(4, 4096), rows(4, 4096), torch.zeros(4096, 16), rows(4, 16), rows(4, 16), torch.zeros(4096), torch.zeros(4096), *carried,
        torch.zeros(1, 4096, 16), rows(4, 4096),
    )  # fmt: skip
    per_head, x = torch.zeros(64), rows(4, 4096).view(4, 64, 64)
    yield "ssd_scan", lambda: ops.ssd_scan(
        x, rows(4, 64), per_head, x[:, :1].repeat(1, 1, 2), x[:, :1].repeat(1, 1, 2), per_head, per_head, *carried,
        torch.zeros(1, 64, 64, 128), x,
    )  # fmt: skip
    a = rows(64, 4096)
    segments = ops.LoraSegments([ops.Segment(0, 4, a, a, 0)])
    yield "sgmv", lambda: ops.lora(rows(4, 4096), rows(4, 4096), segments)
    experts = ops.Grouped([ops.pack_linear(rows(1024, 2048)) for _ in range(4)])
    for n in (8, 512):
        yield "grouped_linear", lambda n=n: ops.grouped_linear(rows(n, 2048), experts, whole(0, 2, 4, 6, n))
    for dim, planes, format in ((128, 2, dtype), (128, 2, torch.int8), (128, 2, torch.float8_e4m3fn), (576, 1, dtype)):
        pool = torch.zeros(256, planes, 8 if planes == 2 else 1, 16, stored_width(dim, format), dtype=format)
        heads, value_dim = pool.shape[2], 512 if planes == 1 else dim
        k = rows(4, heads * dim).view(4, heads, dim)
        yield "store_kv", lambda k=k, pool=pool, planes=planes: ops.store_kv(k, k if planes == 2 else None, pool, whole(0, 1, 2, 3))
        for tokens in (1, 512):
            q, table = rows(tokens, 32 * dim).view(tokens, 32, dim), torch.zeros(1, 256, dtype=torch.int32)
            yield (
                "paged_attention",
                lambda q=q, pool=pool, table=table, v=value_dim: ops.paged_attention(
                    q, pool, whole(0, len(q)), whole(4096), table, 0.1, value_dim=v
                ),
            )
    codes, scales = torch.zeros(4096, 4096, dtype=torch.uint8), torch.ones(4096, 32, dtype=torch.float16)
    counted = scales.repeat(1, 4).to(torch.int8)
    weights = (
        (ops.pack_quantized(codes, scales, group=128), (1, 512)),
        (ops.pack_quantized(codes, scales.repeat(1, 4), counted, group=32), (1,)),
        (ops.pack_quantized(codes.to(torch.int8), scales[:, :1].float()), (1, 512)),
        (ops.pack_quantized(codes.to(torch.float8_e4m3fn), scales[:, :1].float()), (1, 512)),
        (ops.pack_quantized(codes, scales, group=128, table=torch.linspace(-1, 1, 16) ** 3), (512,)),
        (ops.pack_quantized(codes, scales.repeat(1, 16), group=8), (1,)),
        (ops.pack_quantized(codes, counted, counted, group=32, units=scales), (1, 512)),
    )
    experts = [ops.Grouped([packed] * 4) for packed, _ in weights]
    for grouped in experts:
        for n in (8, 512):
            yield (
                "grouped_quantized_linear",
                lambda grouped=grouped, n=n: ops.grouped_quantized_linear(rows(n, 4096), grouped, whole(0, 2, 4, 6, n)),
            )
    for packed, counts in weights:
        for n in counts:
            yield "quantized_linear", lambda packed=packed, n=n: ops.quantized_linear(rows(n, 4096), packed)

    def narrow() -> None:
        from kvrun_kernels.quantized_linear.triton import narrowed

        narrowed(rows(4, 4096))

    yield "quantized_linear", narrow


def compile_all(capability: int, chosen: list[str], dtype: torch.dtype = torch.bfloat16) -> None:
    """Compile what the calls above launch, for all ops or those chosen.

    Prints for each kernel: op, name, registers, bytes of shared memory, bytes spilled.
    """
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
    dispatch.use("reference")  # nothing is packed for the CPU
    dispatch._triton_devices = frozenset({"cpu"})
    op, seen = "", set()

    def launch(self, grid):
        def compiled(*args, **options):
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            if kernel.hash in seen:
                return
            seen.add(kernel.hash)
            dump = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
            with tempfile.NamedTemporaryFile() as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                usage = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
            registers, stack = (int(found) for found in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
            print(op, self.fn.__name__, registers, kernel.metadata.shared, stack, flush=True)

        return compiled

    JITFunction.__getitem__ = launch
    for op, call in calls(ops, dtype):
        if not chosen or op in chosen:
            call()


def test_every_kernel_compiles_and_fits():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, __file__, "90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert {op for op, *_ in found} == {path.parent.name for path in KERNELS.glob("kvrun_kernels/*/triton.py")}
    for op, kernel, _, shared, spilled in found:
        assert int(shared) <= SHARED and int(spilled) < 64, (op, kernel, shared, spilled)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]), sys.argv[2:])
