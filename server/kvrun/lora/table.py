"""The adapters that are resident on this rank, and which rows of a step use which of them."""

from __future__ import annotations

from collections.abc import Mapping

from kvrun_kernels import ops
from torch import Tensor


class LoraBatch:
    """The segments of one step, for every linear that some adapter of the step changes."""

    def __init__(self, sites: Mapping[int, ops.LoraSegments]):
        self._sites = sites

    def apply(self, site: int, x: Tensor, y: Tensor) -> None:
        """Add to `y` what the adapters of these rows change at linear `site`.

        x [tokens, in_features] · y [tokens, out_features], changed in place · rows of no adapter are not touched.
        """
        segments = self._sites.get(site)
        if segments is not None:
            ops.lora(y, x, segments)
