"""vLLM's CPU build, which serves bfloat16 and adapters; it makes no weights of fewer bits at load on CPUs."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from . import Setup, Unavailable


@dataclass(frozen=True)
class Vllm:
    """Its program, and how many cores it may bind."""

    program: Path
    threads: int
    name: str = "vLLM"

    @classmethod
    def find(cls, program: Path | None, threads: int) -> Vllm | None:
        """This program, or that of PATH."""
        found = program or shutil.which("vllm")
        return cls(Path(found), threads) if found else None

    def label(self, setup: Setup) -> str:
        return f"vLLM {setup.weights}"

    def prepare(self, setup: Setup) -> None:
        if setup.weights != "bf16":
            raise Unavailable(f"vLLM makes no {setup.weights} weights at load on CPUs")

    def command(self, setup: Setup, port: int) -> list[str]:
        command = [
            str(self.program), "serve", str(setup.model.folder), "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port),
            "--dtype", "bfloat16", "--max-model-len", str(setup.context), "--max-num-seqs", str(setup.streams),
            "--no-enable-prefix-caching",
        ]  # fmt: skip
        if setup.adapters:
            ranks = max(int(path.name.rpartition("-r")[2]) for path in setup.adapters)
            allowed = min(rank for rank in (8, 16, 32, 64, 128, 256) if rank >= ranks)
            command += ["--enable-lora", "--max-loras", str(len(setup.adapters)), "--max-lora-rank", str(allowed)]
            command += ["--lora-modules", *(f"{path.name}={path}" for path in setup.adapters)]
        return command

    def environment(self, setup: Setup) -> dict[str, str]:
        """Both of two cores compute: by default it would keep one for itself. Its compiler's tools lie beside its program."""
        return {
            "PATH": os.pathsep.join([str(self.program.parent), os.environ.get("PATH", "")]),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-setup.kv_bytes // (1 << 30)))),
            "VLLM_NO_USAGE_STATS": "1",
        }

    def naming(self, setup: Setup, adapter: Path | None) -> dict:
        return {"model": adapter.name if adapter else "base"}

    def reusing(self) -> dict:
        return {}

    def step_bytes(self, setup: Setup) -> int:
        return 2 * (setup.model.linear_parameters + setup.model.head_parameters)
