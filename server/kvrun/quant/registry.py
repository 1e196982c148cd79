"""Every weight format by the name it has in a checkpoint's config or on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvrun.errors import Unsupported
from kvrun.quant.dense import Dense
from kvrun.quant.format import LinearFormat

Settings = Mapping[str, Any]

_stored: dict[str, Callable[[Settings], LinearFormat]] = {}
_made: dict[str, Callable[[], LinearFormat]] = {}
# Names of --quantize for checkpoints whose config says another.
ALSO = {"marlin": ("gptq", "awq"), "bitsandbytes-nf4": ("bitsandbytes",), "bitsandbytes-fp4": ("bitsandbytes",)}
# What others publish and no kernel here reads, with what to use in its stead.
UNREAD = {
    "aqlm": "additive codebooks",
    "quip": "lattice codebooks",
    "squeezellm": "sparse outliers beside a table per row",
    "exl2": "a bit rate per row",
    "exl3": "a bit rate per row",
    "hqq": "zero points that were optimised as floats",
    "spqr": "sparse outliers",
    "vptq": "vector codebooks",
    "higgs": "grids after a rotation",
    "qqq": "two levels of scales",
    "fp6": "floats of 6 bits",
    "torchao": "tensors in a layout of their own",
    "quanto": "tensors in a layout of their own",
    "nvfp4": "two levels of scales",
    "modelopt": "two levels of scales",
}


def stored(name: str) -> Callable[[Callable[[Settings], LinearFormat]], Callable[[Settings], LinearFormat]]:
    """Register what reads a `quantization_config` whose quant_method is `name`."""

    def register(read: Callable[[Settings], LinearFormat]) -> Callable[[Settings], LinearFormat]:
        _stored[name] = read
        return read

    return register


def made(name: str) -> Callable[[Callable[[], LinearFormat]], Callable[[], LinearFormat]]:
    """Register a format that `--quantize name` makes of plain weights while they are loaded."""

    def register(make: Callable[[], LinearFormat]) -> Callable[[], LinearFormat]:
        _made[name] = make
        return make

    return register


def names() -> tuple[list[str], list[str]]:
    """The methods that are read from checkpoints, and those that `--quantize` makes while loading, both sorted."""
    return sorted(_stored), sorted(_made)


def choose(quantize: str | None, config: Settings | None) -> LinearFormat:
    """The format for `--quantize` and a checkpoint's own `quantization_config`. Raises Unsupported when they do not agree."""
    if config:
        return _as_stored(quantize, config)
    if not quantize:
        return Dense()
    if quantize in _made:
        return _made[quantize]()
    _refuse(quantize, f"--quantize {quantize}")
    if quantize in _stored or quantize in ALSO:
        raise Unsupported(
            f"--quantize {quantize} reads weights stored so, and config.json has no quantization_config; name a {quantize} "
            f"checkpoint, or quantize this one while it loads: {', '.join(sorted(_made))}"
        )
    raise Unsupported(f"--quantize {quantize} is not known; known are {', '.join(sorted({*_made, *_stored, *ALSO}))}")


def _as_stored(quantize: str | None, config: Settings) -> LinearFormat:
    method = str(config.get("quant_method") or ("compressed-tensors" if "config_groups" in config else "an unnamed method")).lower()
    _refuse(method, f"the checkpoint is quantized with {method}, which")
    if method not in _stored:
        raise Unsupported(f"the checkpoint is quantized with {method}, which is not read; known are {', '.join(sorted(_stored))}")
    if quantize and method not in (quantize, *ALSO.get(quantize, ())):
        raise Unsupported(f"--quantize {quantize} was asked for and the checkpoint is quantized with {method}; leave the flag out")
    return _stored[method](config)


def _refuse(method: str, asked: str) -> None:
    for name, why in UNREAD.items():
        if method.startswith(name):
            raise Unsupported(f"{asked} is not served: it stores {why}; use a gptq, awq or compressed-tensors version, or the original")
