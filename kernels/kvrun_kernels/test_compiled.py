"""Every op's Triton code compiles for GPUs that are not here, at the sizes of real models and within what their processors hold.

And the steps that a shard makes at start have all compiled that later ones need.

Triton and its assembler need no device for that. Run by itself, this file prints what each kernel takes:
`python test_compiled.py 80 paged_attention` for an A100 and one op.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from kvrun_kernels.stored import stored_width

KERNELS = Path(__file__).resolve().parents[1]
# Bytes of shared memory that one program may have, by compute capability: of an L4 or an RTX 4090, of an H100 and a B200.
SHARED = {"89": 101_376, "90": 232_448, "100": 232_448}
TALL = 512  # rows, for which tiles are largest


def calls(ops, dtype: torch.dtype) -> Iterator[tuple[str, object]]:
    """Each op at the sizes of an 8B model, as (its folder, something that calls it); "tall " before it where it has `TALL` rows."""

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
    table = ops.LoraTable([(0, 4, ops.LoraPointers({0: ops.LoraSegments([ops.Segment(0, 4, a, a, 0)])}, 1))])
    one, tokens = ops.LoraSites((0,)), torch.arange(4)
    of_experts = ops.LoraUse(table, ops.LoraSites((0, 0), tokens[:2]), tokens, tokens[::2])
    for use in (ops.LoraUse(table, one), ops.LoraUse(table, one, tokens), of_experts):
        yield "sgmv", lambda use=use: ops.lora(rows(4, 4096), rows(4, 4096), use)
    experts = ops.Grouped([ops.pack_linear(rows(1024, 2048)) for _ in range(4)])
    for n in (8, TALL):
        yield tall(n) + "grouped_linear", lambda n=n: ops.grouped_linear(rows(n, 2048), experts, whole(0, 2, 4, 6, n))
    for dim, planes, format in ((128, 2, dtype), (128, 2, torch.int8), (128, 2, torch.float8_e4m3fn), (576, 1, dtype)):
        pool = torch.zeros(256, planes, 8 if planes == 2 else 1, 16, stored_width(dim, format), dtype=format)
        heads, value_dim = pool.shape[2], 512 if planes == 1 else dim
        k = rows(4, heads * dim).view(4, heads, dim)
        yield "store_kv", lambda k=k, pool=pool, planes=planes: ops.store_kv(k, k if planes == 2 else None, pool, whole(0, 1, 2, 3))
        for tokens in (1, TALL):
            q, table = rows(tokens, 32 * dim).view(tokens, 32, dim), torch.zeros(1, 256, dtype=torch.int32)
            yield (
                tall(tokens) + "paged_attention",
                lambda q=q, pool=pool, table=table, v=value_dim: ops.paged_attention(
                    q, pool, whole(0, len(q)), whole(4096), table, 0.1, value_dim=v
                ),
            )
    codes, scales = torch.zeros(4096, 4096, dtype=torch.uint8), torch.ones(4096, 32, dtype=torch.float16)
    counted = scales.repeat(1, 4).to(torch.int8)
    weights = (
        (ops.pack_quantized(codes, scales, group=128), (1, TALL)),
        (ops.pack_quantized(codes, scales.repeat(1, 4), counted, group=32), (1,)),
        (ops.pack_quantized(codes.to(torch.int8), scales[:, :1].float()), (1, TALL)),
        (ops.pack_quantized(codes.to(torch.float8_e4m3fn), scales[:, :1].float()), (1, TALL)),
        (ops.pack_quantized(codes, scales, group=128, table=torch.linspace(-1, 1, 16) ** 3), (TALL,)),
        (ops.pack_quantized(codes, scales.repeat(1, 16), group=8), (1,)),
        (ops.pack_quantized(codes, counted, counted, group=32, units=scales), (1, TALL)),
    )
    experts = [ops.Grouped([packed] * 4) for packed, _ in weights]
    for grouped in experts:
        for n in (8, TALL):
            yield (
                tall(n) + "grouped_quantized_linear",
                lambda grouped=grouped, n=n: ops.grouped_quantized_linear(rows(n, 4096), grouped, whole(0, 2, 4, 6, n)),
            )
    for packed, counts in weights:
        for n in counts:
            yield tall(n) + "quantized_linear", lambda packed=packed, n=n: ops.quantized_linear(rows(n, 4096), packed)

    def narrow() -> None:
        from kvrun_kernels.quantized_linear.triton import narrowed

        narrowed(rows(4, 4096))

    yield "quantized_linear", narrow


def tall(rows: int) -> str:
    return "tall " * (rows == TALL)


def ready(capability: int) -> None:
    """Have ops take tensors of the host for those of a GPU that is only compiled for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from kvrun_kernels import dispatch

    class Absent:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    driver.set_active(Absent())
    dispatch.use("reference")  # nothing is packed for the CPU
    dispatch._triton_devices = frozenset({"cpu"})


def compile_all(capability: int, chosen: list[str], dtype: torch.dtype = torch.bfloat16) -> None:
    """Compile what the calls above launch, for all ops or those chosen, or the tall ones.

    Prints for each kernel: op, name, registers, bytes of shared memory, bytes spilled.
    """
    import triton
    from triton.runtime.jit import JITFunction

    from kvrun_kernels import ops

    ready(capability)
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
    for named, call in calls(ops, dtype):
        op = named.removeprefix("tall ")
        if not chosen or op in chosen or ("tall" in chosen and op != named):
            call()


@cache
def held(ops) -> tuple:
    """Codes, and both kinds of experts."""
    weight = ops.pack_quantized(torch.zeros(4096, 4096, dtype=torch.uint8), torch.ones(4096, 32, dtype=torch.float16), group=128)
    return weight, ops.Grouped([ops.pack_linear(torch.zeros(64, 4096, dtype=torch.bfloat16))] * 32), ops.Grouped([weight] * 32)


def steps(ops, tokens: int, sequences: int, pages: int) -> Iterator[tuple[str, object]]:
    """What a step of so many tokens, rows and pages to a row calls, of what depends on them."""
    dtype = torch.bfloat16
    x, starts = torch.zeros(tokens, 4096, dtype=dtype), torch.tensor([*range(sequences), tokens], dtype=torch.int32)
    counted = torch.zeros(tokens, dtype=torch.int32)
    heads = torch.zeros(tokens, 48 * 128, dtype=dtype).view(tokens, 48, 128)
    pool, table = torch.zeros(4, 2, 8, 16, 128, dtype=dtype), torch.zeros(sequences, pages, dtype=torch.int32)
    yield "rope", lambda: ops.rope_(heads[:, :32], heads[:, 32:40], counted, torch.zeros(8, 64), torch.zeros(8, 64))
    yield "store_kv", lambda: ops.store_kv(heads[:, 32:40], heads[:, 40:], pool, counted)
    yield "paged_attention", lambda: ops.paged_attention(heads[:, :32], pool, starts, counted[:sequences], table, 0.1)
    yield "rms_norm", lambda: ops.rms_norm(x, x[0], 1e-5)
    yield "act_mul", lambda: ops.act_mul(x, "silu")
    carried = (starts, counted[:sequences], torch.ones(sequences, dtype=torch.bool))
    yield "causal_conv", lambda: ops.causal_conv(x[:, :64], x[0, :256].view(64, 4), None, *carried, torch.zeros(sequences, 64, 3), "silu")
    weight, plain, quantized = held(ops)
    bounds = torch.tensor([0] * len(plain) + [tokens])
    yield "quantized_linear", lambda: ops.quantized_linear(x, weight)
    yield "grouped_linear", lambda: ops.grouped_linear(x, plain, bounds)
    yield "grouped_quantized_linear", lambda: ops.grouped_quantized_linear(x, quantized, bounds)
    of_adapter = ops.LoraPointers({0: ops.LoraSegments([ops.Segment(0, 0, x[:1], x[:1], 0)])}, 5)
    adapters = ops.LoraTable([(n, n + 1, of_adapter) for n in range(sequences)])
    sites, rows = ops.LoraSites((0,) * 32, torch.zeros(32, dtype=torch.int64)), torch.arange(tokens)
    for use in (ops.LoraUse(adapters, ops.LoraSites((0,))), ops.LoraUse(adapters, ops.LoraSites((0,)), rows)):
        yield "sgmv", lambda use=use: ops.lora(x, x, use)
    yield "sgmv", lambda: ops.lora(x, x, ops.LoraUse(adapters, sites, rows, bounds))


def count_all() -> None:
    """Prints each kernel that later steps would compile, after those of `kvrun_kernels.first_steps`: op, name, tokens, rows, pages."""
    from triton.runtime.jit import JITFunction

    import kvrun_kernels
    from kvrun_kernels import ops

    ready(90)
    found = []

    def note(self, key, signature, device, *_):
        self.device_caches[device][0][key] = object()
        found.append(self.fn.__name__)

    JITFunction._do_compile = note
    JITFunction.__getitem__ = lambda self, grid: lambda *args, **options: self.run(*args, grid=grid, warmup=True, **options)
    first = [(tokens, 1, -(-(start + tokens) // 16)) for tokens, start in kvrun_kernels.first_steps("cpu")]
    sizes = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 127, 129, 300, 511, 1025, 2048, 3000)
    later = {(n, rows, pages) for n in sizes for rows in (1, min(n, 3), n // 2 or 1, n) for pages in (1, 16, 33, 1024)}
    for at, shape in enumerate([*first, *sorted(later)]):
        for op, call in steps(ops, *shape):
            found.clear()
            call()
            for kernel in found:
                if at >= len(first):
                    print(op, kernel, *shape, flush=True)


def run(*words: str) -> list[list[str]]:
    """What this file prints, run by itself."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("capability", "chosen"), [("89", "tall"), ("90", ""), ("90", "exact"), ("100", "tall")])
def test_every_kernel_compiles_and_fits(capability, chosen):
    found = run(capability, *chosen.split())
    if not chosen:
        assert {op for op, *_ in found} == {path.parent.name for path in KERNELS.glob("kvrun_kernels/*/triton.py")}
    for op, kernel, _, shared, spilled in found:
        assert int(shared) <= SHARED[capability] and int(spilled) < 256, (op, kernel, shared, spilled)


def test_nothing_is_compiled_while_requests_wait():
    assert run("later") == []


if __name__ == "__main__":
    if sys.argv[1] == "later":
        count_all()
    else:
        chosen = sys.argv[2:]
        if "exact" in chosen:
            compile_all(int(sys.argv[1]), ["tall"], torch.float32)
        else:
            compile_all(int(sys.argv[1]), chosen)
