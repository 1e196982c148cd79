"""kv.run as this tree built it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import Setup

QUANTIZE = {"bf16": None, "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class KvRun:
    """Its launcher, of this folder of programs."""

    programs: Path
    threads: int
    name: str = "kv.run"

    def label(self, setup: Setup) -> str:
        return f"kv.run {setup.weights}"

    def prepare(self, setup: Setup) -> None:
        """Nothing: it reads what make_model.py writes."""

    def command(self, setup: Setup, port: int) -> list[str]:
        command = [
            str(self.programs / "text-generation-launcher"), "--port", str(port), "--model-id", str(setup.model.folder),
            "--dtype", "bfloat16", "--num-threads", str(self.threads), "--max-total-tokens", str(setup.context),
            "--kv-cache-bytes", str(max(setup.kv_bytes, 1 << 26)),
        ]  # fmt: skip
        if quantize := QUANTIZE[setup.weights]:
            command += ["--quantize", quantize]
        if setup.adapters:
            command += ["--lora-ids", ";".join(f"{path.name}={path}" for path in setup.adapters)]
        if setup.resident:
            largest = max((path / "adapter_model.safetensors").stat().st_size for path in setup.adapters[: setup.resident])
            command += ["--adapter-bytes", str(setup.resident * largest)]
        if setup.packed:
            command += ["--packed-cache", str(setup.packed)]
        return command

    def environment(self, setup: Setup) -> dict[str, str]:
        return {}

    def naming(self, setup: Setup, adapter: Path | None) -> dict:
        return {"adapter_id": adapter.name} if adapter else {}

    def reusing(self) -> dict:
        return {}

    def step_bytes(self, setup: Setup) -> int:
        """As the plan counts them, without the embedding, of which a step reads a row for each sequence."""
        program, quantize = self.programs / "text-generation-server", QUANTIZE[setup.weights] or ""
        asked = ["--dtype", "bfloat16", "--json", "--quantize", quantize]
        said = subprocess.run([program, "inspect", setup.model.folder, *asked], check=True, capture_output=True).stdout
        return json.loads(said)["model"]["rank_weight_bytes"] - 2 * setup.model.head_parameters
