"""Products of grouped rows, each group with a weight of its own: the experts of a mixture in one call."""

from array import array
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu
from kvrun_kernels.linear.op import PackedLinear, linear

SCHEMA = "grouped_linear(Tensor x, PackedLinear[] packed, Tensor offsets, Tensor[]? biases=None) -> Tensor"

_kernel = Kernel("grouped_linear", "ppp iiii iii")


def reference(x: Tensor, packed: Sequence[PackedLinear], offsets: Tensor, biases: Sequence[Tensor] | None = None) -> Tensor:
    out = torch.empty((x.shape[0], packed[0].out_features), dtype=x.dtype, device=x.device)
    for g, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            out[start:stop] = linear(x[start:stop], packed[g], None if biases is None else biases[g])
    return out


def grouped_linear(x: Tensor, packed: Sequence[PackedLinear], offsets: Tensor, biases: Sequence[Tensor] | None = None) -> Tensor:
    """Multiply each group's rows by the transpose of its own weight and add its bias, as `linear` does, to the bit.

    x [rows, in_features], rows of one group adjacent · packed: a weight per group, all of one shape and dtype ·
    offsets [groups + 1] integers: group g owns rows offsets[g] to offsets[g + 1], all rows are owned · biases:
    [out_features] per group · out [rows, out_features], dtype of x. A group without rows costs nothing.
    """
    first = packed[0]
    if x.dim() != 2 or x.shape[1] != first.in_features:
        raise ValueError(f"x of shape [rows, {first.in_features}] asked, found {list(x.shape)}; reshape it first")
    # On a GPU nobody looks at the offsets' values: that would wait for all that runs there.
    if (gpu := _kernel.triton(x)) and len(offsets) == len(packed) + 1 and _uniform(packed, biases or ()):
        return gpu.grouped_linear(x, packed, offsets, biases)
    bounds = offsets.tolist()
    if len(bounds) != len(packed) + 1 or bounds[0] != 0 or bounds[-1] != x.shape[0] or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{len(packed) + 1} rising offsets from 0 to {x.shape[0]} asked, found {bounds}; sort the rows by group")
    taken = [g for g in range(len(packed)) if bounds[g] < bounds[g + 1]]
    added = [biases[g] for g in taken] if biases is not None else []
    run = _kernel.run
    if run is None or not on_cpu(x, *added) or not _alike([packed[g] for g in taken], first) or len({b.dtype for b in added}) > 1:
        return reference(x, packed, offsets, biases)
    table = array("q")
    for n, g in enumerate(taken):
        table.extend((bounds[g], bounds[g + 1], packed[g].held.data_ptr(), added[n].data_ptr() if added else 0))
    out = torch.empty((x.shape[0], first.out_features), dtype=x.dtype)
    run(
        out.data_ptr(), x.data_ptr(), table.buffer_info()[0], len(taken), first.out_features, first.in_features, x.stride(0),
        DTYPES[x.dtype], DTYPES[first.dtype], DTYPES[added[0].dtype] if added else 0,
    )  # fmt: skip
    return out


def _alike(used: list[PackedLinear], first: PackedLinear) -> bool:
    """Whether one table serves them: packed natively, of one shape and dtype."""
    shape = (first.out_features, first.in_features, first.dtype)
    return all(p.packed and (p.out_features, p.in_features, p.dtype) == shape for p in used)


def _uniform(packed: Sequence[PackedLinear], biases: Sequence[Tensor]) -> bool:
    """Whether weights that lie as they came, and their biases, are of one shape and dtype each."""
    plain = all(not p.packed and p.held.is_contiguous() and p.held.shape == packed[0].held.shape for p in packed)
    return plain and len({p.dtype for p in packed}) == 1 and len({b.dtype for b in biases}) <= 1
