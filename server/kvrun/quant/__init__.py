"""Weight formats, one file each. Importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from kvrun.quant.coded import CodedLinear, build
from kvrun.quant.dense import Dense, DenseLinear
from kvrun.quant.format import Axes, LinearFormat, QuantizedLinear
from kvrun.quant.grouped import GroupedWeights
from kvrun.quant.registry import choose

for _format in iter_modules(__path__):
    import_module(f"{__name__}.{_format.name}")

__all__ = ["Axes", "CodedLinear", "Dense", "DenseLinear", "GroupedWeights", "LinearFormat", "QuantizedLinear", "build", "choose"]
