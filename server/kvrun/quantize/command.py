"""`text-generation-server quantize`: its flags, and what is checked before any work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvrun import models
from kvrun.errors import ConfigError, FilesError, Unsupported
from kvrun.hub import amount
from kvrun.quantize import output
from kvrun.spec import Config, Model
from kvrun.weights.checkpoint import Checkpoint
from kvrun.weights.held import method as stored_method

DATA_FREE, CALIBRATED = ("int8", "int4", "fp8"), ("gptq", "awq")
GROUPS = (32, 64, 128)
INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Write the quantized model; the folder on standard output, all else on standard error. Returns the exit code."""
    args = _parser().parse_args(argv)
    if args.group_size is not None and args.method in ("int8", "fp8"):
        raise ConfigError(f"--group-size {args.group_size}: {args.method} has one scale for each output; leave the flag out")
    if (args.calibration is not None) != (args.method in CALIBRATED):
        raise ConfigError(_calibration_cure(args.method))
    config, model = _plain(args.model)
    try:
        if args.method in CALIBRATED:
            from kvrun.quantize.calibrated import calibrate

            calibrate(args.model, model, args.out, args.method, args.group_size, args.calibration)
        else:
            _convert(args.model, config, model, args.out, args.method, args.group_size)
    except KeyboardInterrupt:
        _say(f"interrupted; {args.out} was not written")
        return INTERRUPTED
    print(args.out)
    return 0


def _convert(source: Path, config: Config, model: Model, out: Path, method: str, group: int | None) -> None:
    from tqdm import tqdm

    from kvrun.quantize.convert import Conversion
    from kvrun.quantize.layout import layout

    chosen = layout(method, group)
    conversion = Conversion(Checkpoint.open(source), model, chosen)
    modules = conversion.modules
    output.check(out, source, conversion.written_bytes)
    if modules.uneven:
        _say(f"{len(modules.uneven)} linears stay plain, their inputs are no multiple of {chosen.per}: {', '.join(modules.uneven[:5])} ...")
    if any(coded.transposed for coded in modules.coded.values()):
        _say(f"{config.architecture} stores linears transposed: kv.run and vLLM read codes of such, transformers does not")
    with output.complete(out) as folder, tqdm(total=conversion.read_bytes, desc=method, unit="B", unit_scale=True, file=sys.stderr) as bar:
        conversion.write(folder, bar.update)
        coded = [coded.module for coded in modules.coded.values()]
        output.write_config(source, folder, chosen.config(coded, modules.plain))
        output.copy_others(source, folder)
    _say(f"{len(coded)} linears in {method}: {amount(conversion.read_bytes)} became {amount(conversion.written_bytes)}")


def _plain(source: Path) -> tuple[Config, Model]:
    """The config and the description of a model folder whose weights are plain."""
    if not source.is_dir():
        raise FilesError(f"{source} is not a folder; `text-generation-server download-weights` fetches a repository and prints its folder")
    config, model = models.read(source)
    stored = config.get("quantization_config") or config.get("compression_config")
    if stored:
        raise Unsupported(f"{source} is quantized already, with {stored_method(None, stored)}; name its original, or serve it as it is")
    return config, model


def _calibration_cure(method: str) -> str:
    if method in CALIBRATED:
        return (
            f"--method {method} adjusts codes to what the model reads; name a file of such text with --calibration: one document a line, "
            'or {"text": ...} a line in a file that ends in .jsonl'
        )
    return f"--calibration has no use: --method {method} needs no data; leave it out, or use --method {' or '.join(CALIBRATED)}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """A wrong flag is a wrong configuration, with its exit code."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="text-generation-server quantize", description="Write a model's weights in fewer bits.")
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder with config.json and plain *.safetensors")
    add("out", type=Path, metavar="OUT", help="folder to write; new or empty")
    add("--method", required=True, choices=(*DATA_FREE, *CALIBRATED), help="gptq and awq need --calibration and kvrun[quantize]")
    add("--group-size", type=int, choices=GROUPS, help="inputs that share a scale: int4 32, gptq and awq 128 when absent")
    add("--calibration", type=Path, metavar="FILE", help="text for gptq and awq: a document a line, or a .jsonl file with a field text")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
