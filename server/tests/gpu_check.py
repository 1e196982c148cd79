"""Runs on a GPU what all other tests show without one, then measures it: `make gpu-check`. Ends in a table.

Without a GPU it runs nothing and ends with 14, as a shard does that was to compute on one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvrun.attention.flashinfer import missing
from kvrun.device import choose
from kvrun.errors import DeviceError

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = "attention by FlashInfer equals the reference"
# Kernels are compiled for most tests, each on a processor of the host; each process takes half a gigabyte of the GPU.
TESTS = ("-m", "pytest", "-m", "gpu", "--numprocesses", str(min(8, os.cpu_count() or 1)))
# What is shown, and by which arguments of this Python.
STAGES = {
    "kernels equal their references": (*TESTS, "kernels"),
    "models, sampling and adapters equal transformers and the CPU": (*TESTS, "server/tests/test_device.py"),
    "captured and overlapped steps answer as those that are not": (
        *TESTS,
        "server/tests/test_captured.py",
        "server/tests/test_overlap_on_gpus.py",
    ),
    ATTENTION: (*TESTS, "server/tests/test_flashinfer.py"),
    "kernels beside the limits of memory and arithmetic": ("-m", "kvrun_kernels.bench", "--device", "cuda", "--seconds", "0.1"),
    "decode and prefill of 1.1 billion parameters": ("benchmark/shapes.py", "1b", "--device", "cuda"),
    "decode and prefill of 8 billion parameters": ("benchmark/shapes.py", "8b", "--device", "cuda"),
}
# Seconds that one stage may take, and all of them.
MOST_SECONDS, ALL_SECONDS = 240, 600


def main() -> int:
    """The exit code: 0 if every stage passed, 14 without a GPU, else 1."""
    try:
        device = choose("cuda", 0)
    except DeviceError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return error.exit_code
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"HF_HUB_OFFLINE": "1"}
    lines, end = [], time.monotonic() + ALL_SECONDS
    for shown, arguments in STAGES.items():
        if shown == ATTENTION and (why := missing(device.capability)):
            lines.append((shown, "not run", why))
            continue
        began = time.monotonic()
        result = _run(arguments, environment, min(MOST_SECONDS, end - began))
        lines.append((shown, result, f"{time.monotonic() - began:.0f} s"))
    print(f"\n| on {device.describe()} | | |\n|---|---|---|")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    return 0 if all(result in ("passed", "not run") for _, result, _ in lines) else 1


def _run(arguments: Sequence[str], environment: Mapping[str, str], seconds: float) -> str:
    """How a stage ended; one that hangs or cannot begin is a line of the table like any other."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env={**environment, "PYTHONPATH": "kernels:server"}, timeout=max(seconds, 0)
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"failed ({type(error).__name__})"
    return "passed" if done.returncode == 0 else f"failed ({done.returncode})"


if __name__ == "__main__":
    sys.exit(main())
