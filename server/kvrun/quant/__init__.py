"""Weight formats, one file each."""

from collections.abc import Mapping
from typing import Any

from kvrun.errors import Unsupported
from kvrun.quant.dense import Dense, DenseLinear
from kvrun.quant.format import Axes, LinearFormat, QuantizedLinear
from kvrun.quant.grouped import grouped_matmul

__all__ = ["Axes", "Dense", "DenseLinear", "LinearFormat", "QuantizedLinear", "choose", "grouped_matmul"]


def choose(quantize: str | None, stored: Mapping[str, Any] | None) -> LinearFormat:
    """The format for `--quantize` and a checkpoint's own `quantization_config`. Raises Unsupported for any but dense."""
    if quantize:
        raise Unsupported(f"--quantize {quantize} is not served; leave it out to serve the weights as they are stored")
    if stored:
        method = stored.get("quant_method", "an unnamed method")
        raise Unsupported(f"the checkpoint is quantized with {method}, which is not served; use its unquantized original")
    return Dense()
