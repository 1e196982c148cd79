"""Choosing levels, sharing threads, and the promise that a processor never meets instructions it lacks."""

import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import dispatch, ops

KERNELS = Path(__file__).resolve().parents[1]

needs_library = pytest.mark.skipif(not kvrun_kernels.levels(), reason="native.so: not built")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd=KERNELS)


@needs_library
def test_every_level_can_be_forced_by_the_environment():
    for level in kvrun_kernels.levels():
        found = run_python("import kvrun_kernels; print(kvrun_kernels.describe()['linear'])", KVRUN_ISA=level)
        assert found.stdout.strip() == f"native/{level}", found.stderr


def test_the_reference_can_be_forced_by_the_environment():
    code = "import kvrun_kernels; print(set(kvrun_kernels.describe().values()))"
    assert run_python(code, KVRUN_KERNELS="reference").stdout.strip() == "{'reference'}"


def test_a_level_that_is_not_here_is_refused_by_name():
    with pytest.raises(ValueError, match="'avx1024' asked, this machine has"):
        kvrun_kernels.use("avx1024")


@needs_library
def test_processors_of_one_level_never_run_code_of_another():
    """Object files share no symbol with code in it: the linker has nothing to pick from the wrong level."""
    objects = sorted((KERNELS / "build").glob("*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("build/*.o and nm: not both here")
    for path in objects:
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in symbols.splitlines() if line.split()[-2] in ("W", "V", "u", "w", "v")]
        assert not shared, (path.name, shared)


@needs_library
@pytest.mark.skipif(shutil.which("objdump") is None or platform.machine() != "x86_64", reason="objdump on x86_64: not here")
def test_lower_levels_hold_no_wider_registers():
    objects = sorted((KERNELS / "build").glob("*.o"))
    if not objects:
        pytest.skip("build/*.o: not here")
    for path in objects:
        level = path.name.split(".")[1].split("-")[0]
        code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True).stdout
        assert ("%zmm" in code) == level.startswith("avx512"), path.name
        if level != "avx512_bf16":
            assert "dpbf16" not in code, path.name
        if not level.startswith("avx"):
            assert "%ymm" not in code, path.name


def test_calls_from_many_threads_at_once_are_right():
    packed = ops.pack_linear(torch.randn(3000, 400))
    inputs = [torch.randn(20, 400) for _ in range(6)]
    expected = [ops.linear(x, packed) for x in inputs]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(40):
            if not torch.equal(ops.linear(inputs[n], packed), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=120)
    assert not any(t.is_alive() for t in threads) and not wrong


def test_the_number_of_threads_can_change_between_calls():
    packed, x = ops.pack_linear(torch.randn(900, 300)), torch.randn(9, 300)
    expected, before = ops.linear(x, packed), kvrun_kernels.get_num_threads()
    try:
        for count in (1, 4, 2, 7, 1, 3) * 5:
            kvrun_kernels.set_num_threads(count)
            assert kvrun_kernels.get_num_threads() == count
            assert torch.equal(ops.linear(x, packed), expected)
        with pytest.raises(ValueError, match="0 threads asked"):
            kvrun_kernels.set_num_threads(0)
    finally:
        kvrun_kernels.set_num_threads(before)


@needs_library
def test_a_forked_child_computes_too():
    code = """
import os, torch, kvrun_kernels
from kvrun_kernels import ops
kvrun_kernels.set_num_threads(3)
packed, x = ops.pack_linear(torch.randn(900, 300)), torch.randn(9, 300)
expected = ops.linear(x, packed)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(ops.linear(x, packed), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code).stdout.strip() == "0"


@needs_library
def test_idle_workers_burn_no_time():
    code = """
import time, torch, kvrun_kernels
from kvrun_kernels import ops
kvrun_kernels.set_num_threads(4)
ops.linear(torch.randn(9, 300), ops.pack_linear(torch.randn(900, 300)))
time.sleep(0.2)
start = time.process_time()
time.sleep(1.0)
print(time.process_time() - start)
"""
    assert float(run_python(code, OMP_NUM_THREADS="1").stdout) < 0.05


def test_tensors_that_native_code_cannot_read_go_to_the_reference():
    assert not dispatch.on_cpu(torch.zeros(2, 2, dtype=torch.float64))
    assert not dispatch.on_cpu(torch.zeros(2, 2).T)
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert ops.rms_norm(x, weight, 1e-6).dtype == torch.float64


def test_a_run_on_the_cpu_never_loads_triton():
    code = """
import sys, torch
from kvrun_kernels import ops
import kvrun_kernels
x, packed = torch.randn(2, 16), ops.pack_quantized(torch.zeros(8, 16, dtype=torch.int8), torch.ones(8, 1))
ops.rms_norm(ops.quantized_linear(x, packed), torch.ones(8), 1e-6)
print("triton" in sys.modules, kvrun_kernels.describe()["rms_norm"].split("/")[0])
"""
    expected = "native" if kvrun_kernels.levels() else "reference"
    assert run_python(code).stdout.split() == ["False", expected]


@needs_library
def test_a_recorded_pass_never_loads_the_compiler():
    code = """
import sys, torch
from kvrun_kernels import ops
from kvrun_kernels.recording import Arena, Recording
with Recording(Arena()):
    ops.rms_norm(torch.randn(2, 16), torch.ones(16), 1e-6) + 1
print("torch._dynamo" in sys.modules)
"""
    assert run_python(code).stdout.strip() == "False"


def test_what_serves_an_op_depends_on_the_device():
    code = "import kvrun_kernels; print(*(kvrun_kernels.describe('cuda')[op] for op in ('rms_norm', 'quantized_linear', 'linear')))"
    assert run_python(code).stdout.split() == ["triton", "triton", "torch"]
    assert run_python(code, KVRUN_KERNELS="reference").stdout.split() == ["reference"] * 3


def test_triton_on_the_cpu_is_refused_where_it_would_not_be_interpreted():
    code = "import kvrun_kernels; kvrun_kernels.use('triton')"
    assert "set TRITON_INTERPRET=1 before it is loaded" in run_python(code, TRITON_INTERPRET="0").stderr
    code += "; print(kvrun_kernels.describe()['rms_norm'])"
    assert run_python(code, TRITON_INTERPRET="1").stdout.strip() == "triton/interpreter"
