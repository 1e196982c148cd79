"""Products of grouped rows with weights of any format."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.quant.dense import DenseLinear
from kvrun.quant.format import QuantizedLinear


class GroupedWeights:
    """Weights of one format and shape, of which each multiplies rows of its own."""

    def __init__(self, weights: Sequence[QuantizedLinear]) -> None:
        self._weights = tuple(weights)
        self._plain = [weight.packed for weight in weights if isinstance(weight, DenseLinear)]

    def matmul(self, x: Tensor, offsets: Tensor, biases: Sequence[Tensor] | None = None) -> Tensor:
        """Rows offsets[g] to offsets[g + 1] of x times the transpose of weight g, plus its bias.

        x [rows, in], at least one · offsets [groups + 1] int64 · out [rows, out]. A group without rows costs nothing.
        """
        if len(self._plain) == len(self._weights):
            return ops.grouped_linear(x, self._plain, offsets, biases)
        parts = [
            self._weights[group].matmul(x[start:stop], None if biases is None else biases[group])
            for group, (start, stop) in enumerate(pairwise(offsets.tolist()))
            if start < stop
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
