"""Products of grouped rows with weights of any format."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from kvrun_kernels import ops
from torch import Tensor

from kvrun.quant.dense import DenseLinear
from kvrun.quant.format import QuantizedLinear


def grouped_matmul(x: Tensor, weights: Sequence[QuantizedLinear], offsets: Tensor, biases: Sequence[Tensor] | None = None) -> Tensor:
    """Rows offsets[g] to offsets[g + 1] of x times the transpose of weights[g], plus its bias.

    x [rows, in] · weights of one format and shape · offsets [groups + 1] int64 · out [rows, out]. A group without rows
    costs nothing.
    """
    dense = [weight.packed for weight in weights if isinstance(weight, DenseLinear)]
    if len(dense) == len(weights):
        return ops.grouped_linear(x, dense, offsets, biases)
    ends = offsets.tolist()
    parts = [
        weights[group].matmul(x[start:stop], None if biases is None else biases[group])
        for group, (start, stop) in enumerate(pairwise(ends))
        if start < stop
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
