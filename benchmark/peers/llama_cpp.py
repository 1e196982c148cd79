"""llama.cpp's server, of a source folder that was built with cmake; the folder's own converters write its weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import Setup, Unavailable

TYPES = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}


@dataclass(frozen=True)
class LlamaCpp:
    """`folder` holds its sources and `build/bin`, or is missing where only the server was found and converted files must be there."""

    server: Path
    folder: Path | None
    threads: int
    name: str = "llama.cpp"

    @classmethod
    def find(cls, folder: Path | None, threads: int) -> LlamaCpp | None:
        """Of this folder, or of PATH."""
        if folder:
            return cls(folder / "build" / "bin" / "llama-server", folder, threads)
        found = shutil.which("llama-server")
        return cls(Path(found), None, threads) if found else None

    def label(self, setup: Setup) -> str:
        return f"llama.cpp {TYPES[setup.weights].upper() if setup.weights != 'bf16' else 'bf16'}"

    def weights(self, setup: Setup) -> Path:
        return setup.model.folder / f"{TYPES[setup.weights]}.gguf"

    def prepare(self, setup: Setup) -> None:
        """Convert the weights and adapters once; they stay beside those they were made from."""
        model = setup.model.folder
        if not (model / "bf16.gguf").exists():
            self.convert("convert_hf_to_gguf.py", model, "--outtype", "bf16", "--outfile", model / "bf16.gguf")
        if not self.weights(setup).exists():
            quantize = self.source() / "build" / "bin" / "llama-quantize"
            made: list[str | Path] = [quantize, model / "bf16.gguf", self.weights(setup), TYPES[setup.weights].upper()]
            subprocess.run(made, check=True, capture_output=True)
        for adapter in setup.adapters:
            out = adapter / "adapter.gguf"
            if not out.exists():
                self.convert("convert_lora_to_gguf.py", "--base", model, adapter, "--outtype", "bf16", "--outfile", out)

    def source(self) -> Path:
        if self.folder is None:
            raise Unavailable("llama-server of PATH has no converter beside it; give --llama-cpp the folder of llama.cpp's sources")
        return self.folder

    def convert(self, program: str, *arguments: str | Path) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(self.source() / "gguf-py"), os.environ.get("PYTHONPATH", "")])}
        ran = subprocess.run([sys.executable, self.source() / program, *arguments], env=env, capture_output=True, text=True)
        if ran.returncode:
            raise Unavailable(f"{program} failed; it needs the packages of llama.cpp's requirements.txt:\n{ran.stderr[-800:]}")

    def command(self, setup: Setup, port: int) -> list[str]:
        command = [
            str(self.server), "--port", str(port), "-m", str(self.weights(setup)), "-t", str(self.threads), "-tb", str(self.threads),
            "-np", str(setup.streams), "-c", str(setup.streams * setup.context), "--no-cache-prompt", "--cache-ram", "0",
        ]  # fmt: skip
        if setup.adapters:
            command += ["--lora", ",".join(str(path / "adapter.gguf") for path in setup.adapters), "--lora-init-without-apply"]
        return command

    def environment(self, setup: Setup) -> dict[str, str]:
        return {}

    def naming(self, setup: Setup, adapter: Path | None) -> dict:
        """Every adapter is named with its scale: one that is not would keep what the start gave it."""
        return {"lora": [{"id": i, "scale": float(path == adapter)} for i, path in enumerate(setup.adapters)]} if setup.adapters else {}

    def reusing(self) -> dict:
        return {"cache_prompt": True}

    def step_bytes(self, setup: Setup) -> int:
        """Of all tensors in the file but the embedding."""
        from gguf import GGUFReader

        return sum(int(t.n_bytes) for t in GGUFReader(self.weights(setup)).tensors if t.name != "token_embd.weight")
