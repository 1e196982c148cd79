"""Products of grouped rows with weights of any format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvrun_kernels import ops
from kvrun_kernels.grouped import owned
from torch import Tensor

from kvrun.quant.coded import CodedLinear
from kvrun.quant.dense import DenseLinear
from kvrun.quant.format import QuantizedLinear


class GroupedWeights:
    """Weights of one format and shape, of which each multiplies rows of its own and adds a bias of its own, or none."""

    def __init__(self, weights: Sequence[QuantizedLinear], biases: Sequence[Tensor] | None = None) -> None:
        self._weights, self._biases = tuple(weights), biases
        plain = [weight.packed for weight in weights if isinstance(weight, DenseLinear)]
        self._plain = ops.Grouped(plain, biases) if len(plain) == len(weights) else None
        self._coded = [weight for weight in weights if isinstance(weight, CodedLinear)]
        packed = ops.Grouped([weight.packed for weight in self._coded], biases) if len(self._coded) == len(weights) else None
        # Codes of several forms have no place in one call.
        self._packed = packed if packed is not None and packed.table is not None else None
        self._rounded = any(weight.rounded == torch.int8 for weight in self._coded)  # floats of 8 bits meet experts one by one only
        self._ordered = any(weight.ordered for weight in self._coded)

    def matmul(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows offsets[g] to offsets[g + 1] of x times the transpose of weight g, plus its bias.

        x [rows, in], at least one · offsets [groups + 1] int64 · out [rows, out]. A group without rows costs nothing.
        """
        if self._plain is not None:
            return ops.grouped_linear(x, self._plain, offsets)
        if self._packed is not None and not self._ordered:
            return ops.grouped_quantized_linear(x, self._packed, offsets, rounded=self._rounded)
        rows = owned(x, offsets.tolist())
        if self._packed is not None:
            arranged = torch.cat([self._coded[group].arranged(mine) for group, mine in rows])
            return ops.grouped_quantized_linear(arranged, self._packed, offsets, rounded=self._rounded)
        biases = self._biases
        return torch.cat([self._weights[group].matmul(mine, None if biases is None else biases[group]) for group, mine in rows])
