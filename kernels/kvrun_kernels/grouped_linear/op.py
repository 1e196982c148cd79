"""Products of grouped rows, each group with a weight of its own: the experts of a mixture in one call."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvrun_kernels.linear.op import PackedLinear, linear

SCHEMA = "grouped_linear(Tensor x, PackedLinear[] packed, Tensor offsets, Tensor[]? biases=None) -> Tensor"


def reference(x: Tensor, packed: Sequence[PackedLinear], offsets: Tensor, biases: Sequence[Tensor] | None = None) -> Tensor:
    out = torch.empty((x.shape[0], packed[0].out_features), dtype=x.dtype, device=x.device)
    ends = offsets.tolist()
    for g, (start, stop) in enumerate(pairwise(ends)):
        if start < stop:
            out[start:stop] = linear(x[start:stop], packed[g], None if biases is None else biases[g])
    return out


def grouped_linear(x: Tensor, packed: Sequence[PackedLinear], offsets: Tensor, biases: Sequence[Tensor] | None = None) -> Tensor:
    """Multiply each group's rows by the transpose of its own weight and add its bias, as `linear` does, to the bit.

    x [rows, in_features], rows of one group adjacent · packed: a weight per group, all of one shape and dtype ·
    offsets [groups + 1]: group g owns rows offsets[g] to offsets[g + 1], all rows are owned · biases: [out_features] per
    group · out [rows, out_features], dtype of x. A group without rows costs nothing.
    """
    if x.dim() != 2 or x.shape[1] != packed[0].in_features:
        raise ValueError(f"x of shape [rows, {packed[0].in_features}] asked, found {list(x.shape)}; reshape it first")
    return reference(x, packed, offsets, biases)
