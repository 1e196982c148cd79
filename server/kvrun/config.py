"""The only reader of the shard's flags and environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvrun.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ACTIVATION_DTYPES = ("auto", "int8", "fp8")
ATTENTION = ("auto", "flashinfer", "native")
KV_CACHE_DTYPES = (*DTYPES, "fp8_e4m3fn", "fp8_e5m2", "int8")


@dataclass(frozen=True)
class ServeConfig:
    """One rank of one shard group, as asked for."""

    model_dir: Path
    uds_path: Path
    rank: int
    world_size: int
    rendezvous: Path | None  # a file all ranks see and no earlier group has used; None for a group of one
    model_id: str
    device: str
    cuda_memory_fraction: float  # of a GPU's memory that this rank may take
    cuda_graphs: tuple[int, ...]  # numbers of rows whose decoding steps are captured
    strict_kernels: bool
    attention: str
    dtype: str
    kv_cache_dtype: str
    quantize: str | None
    activation_dtype: str
    packed_cache: Path | None
    num_threads: int  # 0 = one for each processor that this process may run on
    kv_cache_bytes: int  # 0 = a share of what is free
    adapter_bytes: int  # 0 = a share of what is free
    page_tokens: int
    json_output: bool
    death_fd: int | None  # a pipe whose other end the launcher holds; its end is ours

    @classmethod
    def parse(cls, argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> ServeConfig:
        """Read and check. Raises ConfigError; argparse itself ends the process on an unknown flag."""
        args = _parser().parse_args(argv)
        if not 0 <= args.rank < args.world_size:
            raise ConfigError(f"--rank {args.rank} is not below --world-size {args.world_size}")
        if args.world_size > 1 and (args.rendezvous is None or not args.rendezvous.absolute().parent.is_dir()):
            raise ConfigError(f"--world-size {args.world_size} needs --rendezvous, a fresh file in a folder that all ranks see")
        for name in ("num_threads", "kv_cache_bytes", "adapter_bytes"):
            if getattr(args, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} is negative; 0 chooses by itself")
        if not 0 < args.cuda_memory_fraction <= 1:
            raise ConfigError(
                f"--cuda-memory-fraction {args.cuda_memory_fraction:g} is no share of memory; give a number above 0, at most 1"
            )
        if args.page_tokens < 1:
            raise ConfigError(f"--page-tokens {args.page_tokens} must be at least 1")
        death_fd = environ.get("KVRUN_DEATH_FD")
        if death_fd is not None and not death_fd.isdigit():
            raise ConfigError(f"KVRUN_DEATH_FD is {death_fd!r}; it must be the number of an open file descriptor")
        return cls(
            **{**vars(args), "model_id": args.model_id or str(args.model_dir), "quantize": args.quantize or None},
            death_fd=None if death_fd is None else int(death_fd),
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """A wrong flag is a wrong configuration, with its exit code."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def _sizes(text: str) -> tuple[int, ...]:
    """Numbers of rows as in "1,2,4", none for "0"."""
    words = [] if text.strip() == "0" else text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(f"--cuda-graphs {text} is no list of numbers above 0 with commas between them, nor 0 alone, which captures none")
    return tuple(sorted({int(word) for word in words}))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="text-generation-server serve", description="Serve one rank of a model over a Unix socket.")
    add = parser.add_argument
    add("model_dir", type=Path, help="folder with config.json and *.safetensors, or a GGUF file")
    add("--uds-path", type=Path, required=True, help="socket to bind; its folder must exist and be private")
    add("--rank", type=int, default=0)
    add("--world-size", type=int, default=1)
    add("--rendezvous", type=Path, help="file at which the ranks meet; fresh for every start of the group")
    add("--model-id", default="", help="name to answer with; the folder when absent")
    add("--device", choices=DEVICES, default="auto", help="auto = the GPU of this rank's number where there is one, else the CPU")
    add("--cuda-memory-fraction", type=float, default=1.0, help="of a GPU's memory that this rank may take")
    add("--cuda-graphs", type=_sizes, default=(), help="numbers of rows whose decoding steps a GPU captures, such as 1,2,4; 0 = none")
    add("--strict-kernels", action="store_true", help="refuse to start where plain PyTorch would serve an op")
    add("--attention", choices=ATTENTION, default="auto", help="auto = FlashInfer where it is installed and knows the GPU, else native")
    add("--dtype", choices=DTYPES, default="auto", help="auto = the checkpoint's own; on a GPU in 16 bits")
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="auto = the model's")
    add("--quantize", default="", help="weight format; the checkpoint's own when absent")
    add("--activation-dtype", choices=ACTIVATION_DTYPES, default="auto", help="what quantized linears multiply; 8 bits are not exact")
    add("--packed-cache", type=Path, help="folder that keeps weights as the kernels read them, for the next start")
    add("--num-threads", type=int, default=0, help="threads of this rank; 0 = one for each processor it may run on")
    add("--kv-cache-bytes", type=int, default=0, help="bytes for key/value pages; 0 = a share of what is free")
    add("--adapter-bytes", type=int, default=0, help="bytes for adapters, on GPUs of the host's memory; 0 = a share of what is free")
    add("--page-tokens", type=int, default=16, help="tokens in a page")
    add("--json-output", action="store_true", help="log one JSON object per line")
    return parser
