"""The commands of text-generation-server. Each imports what it needs when it runs: `--help` and errors need no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvrun import __version__
from kvrun.errors import ConfigError, DeviceError, KvrunError

if TYPE_CHECKING:
    from kvrun.config import ServeConfig
    from kvrun.engine.engine import Engine

USAGE = """\
usage: text-generation-server COMMAND ...

Commands:
  serve MODEL_DIR --uds-path PATH   serve one rank of a model; started by text-generation-launcher
  download-weights REPO             fetch a model or an adapter, print its folder
  describe --model-id DIR           print how a model is understood, part by part
  inspect MODEL_DIR                 print what a model needs, from its headers alone
  quantize MODEL OUT --method M     write a model's weights in fewer bits

`text-generation-server COMMAND --help` says more. Exit codes: 10 configuration, 11 files, 12 memory, 14 device, 70 a bug.
"""


def serve(argv: Sequence[str]) -> int:
    """Serve one rank until it is told to stop."""
    from kvrun.config import ServeConfig

    config = ServeConfig.parse(argv)
    from kvrun.rpc import log, process
    from kvrun.rpc.service import Identity

    log.configure(as_json=config.json_output, rank=config.rank)
    identity = Identity(config.model_id, config.rank, config.world_size)
    return process.run(config.uds_path, identity, config.death_fd, lambda: _load(config))


def _load(config: ServeConfig) -> Engine:
    """This rank's engine, warm. The socket is bound by now, so this is where torch is imported."""
    import kvrun_kernels
    import torch

    from kvrun import device as devices
    from kvrun import hub
    from kvrun.dist import Group
    from kvrun.engine.engine import Engine
    from kvrun.engine.memory import MemoryBudget
    from kvrun.nn.build import load_model

    if config.num_threads:
        kvrun_kernels.set_num_threads(config.num_threads)
    torch.set_num_threads(kvrun_kernels.get_num_threads())
    device = devices.choose(config.device, config.rank, config.cuda_memory_fraction)
    devices.refuse_unless("cpu", device, {"--packed-cache": config.packed_cache is not None})
    devices.refuse_unless("cuda", device, {"--cuda-graphs": bool(config.cuda_graphs)})
    devices.serving(device, config.strict_kernels)
    device.begin()
    try:
        group = Group.join(config.rendezvous or "", config.rank, config.world_size, device.place)
    except RuntimeError as error:
        raise DeviceError(f"the {config.world_size} ranks did not meet at {config.rendezvous}: {error}") from error
    model = load_model(
        hub.local(config.model_dir),
        dtype=config.dtype,
        device=device,
        group=group,
        quantize=config.quantize,
        activation_dtype=config.activation_dtype,
        packed_cache=config.packed_cache,
        attention=config.attention,
    )
    kv_dtype = None if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    ranks = config.world_size if device.shared else 1
    budget = MemoryBudget(config.kv_cache_bytes, config.adapter_bytes, ranks, device.free_bytes)
    engine = Engine(model, group, budget, config.page_tokens, kv_dtype, config.cuda_graphs)
    engine.warm()
    devices.announce(device, engine.kernels, model.activation_dtype)
    return engine


def download_weights(argv: Sequence[str]) -> int:
    """Fetch a repository from the hub."""
    from kvrun import hub

    return hub.main(list(argv)) or 0


def describe(argv: Sequence[str]) -> int:
    """Print a model's description."""
    import argparse

    parser = argparse.ArgumentParser(prog="text-generation-server describe", description="Print how a model is understood.")
    parser.add_argument("--model-id", type=Path, required=True, help="folder with config.json, or a GGUF file")
    folder = parser.parse_args(argv).model_id
    from kvrun import hub, models, spec

    _, model = models.read(hub.local(folder))
    print(spec.describe(model))
    return 0


def inspect(argv: Sequence[str]) -> int:
    """Print what a model needs."""
    from kvrun import inspect as inspection

    return inspection.main(list(argv)) or 0


def quantize(argv: Sequence[str]) -> int:
    """Write a model's weights in fewer bits."""
    from kvrun.quantize import command

    return command.main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "download-weights": download_weights,
    "describe": describe,
    "inspect": inspect,
    "quantize": quantize,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else ConfigError.exit_code
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    try:
        command = COMMANDS.get(argv[0])
        if command is None:
            raise ConfigError(f"{argv[0]!r} is no command; one of {', '.join(COMMANDS)} is")
        return command(argv[1:])
    except KvrunError as error:
        print(f"text-generation-server: {error}", file=sys.stderr)
        return error.exit_code
