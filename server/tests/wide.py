"""Arithmetic in float64: all of transformers, and this server's plain references, so that two formulas can be compared without rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import safetensors.torch  # noqa: F401  (see `wide`)
import torch
from kvrun.nn import build
from kvrun.state import pages
from torch.overrides import TorchFunctionMode

WIDER = {torch.float32: torch.float64}


class Wide(TorchFunctionMode):
    """Computes in float64 what is said to be computed in float32 whatever a model's dtype is."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        """Calls the function with the one type in the place of the other."""
        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(_wider, arguments), **{name: _wider(value) for name, value in (named or {}).items()})


def _wider(value: object) -> object:
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def wide() -> Iterator[None]:
    """Everything in float64, in this thread; a model of this server has to be loaded and run within, from a checkpoint in float64.

    A module that is imported within would keep the wider types for good, so import what you need before.
    """
    torch.set_default_dtype(torch.float64)
    try:
        with (
            Wide(),
            patch.multiple(torch, float32=torch.float64, float=torch.float64),
            patch.dict(build.DTYPES, float32=torch.float64),
            patch.dict(pages._NAMES, {torch.float64: "float32"}),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
