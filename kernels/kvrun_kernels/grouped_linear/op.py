"""Products of grouped rows, each group with a weight of its own: the experts of a mixture in one call."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu
from kvrun_kernels.grouped import Grouped, owned
from kvrun_kernels.linear.op import PackedLinear, linear

SCHEMA = "grouped_linear(Tensor x, Grouped[PackedLinear] grouped, Tensor offsets) -> Tensor"

_kernel = Kernel("grouped_linear", "pppp iiii iii")


def reference(x: Tensor, grouped: Grouped[PackedLinear], offsets: Tensor) -> Tensor:
    parts = [linear(rows, grouped.packed[g], grouped.bias(g)) for g, rows in owned(x, grouped.bounds(x, offsets))]
    return torch.cat(parts) if parts else x.new_empty((0, grouped.first.out_features))


def grouped_linear(x: Tensor, grouped: Grouped[PackedLinear], offsets: Tensor) -> Tensor:
    """Multiply each group's rows by the transpose of its own weight and add its bias, as `linear` does, to the bit.

    x [rows, in_features], rows of one group adjacent · offsets [groups + 1] integers: group g owns rows offsets[g] to
    offsets[g + 1], all rows are owned · out [rows, out_features], dtype of x. A group without rows costs nothing.
    """
    first = grouped.first
    grouped.check(x)
    table, bias_dtype = grouped.table, grouped.bias_dtype
    # On a GPU nobody looks at the offsets' values: that would wait for all that runs there.
    if (gpu := _kernel.triton(x)) and table is not None and not first.packed and len(offsets) == len(grouped) + 1:
        return gpu.grouped_linear(x, grouped, offsets)
    if _kernel.run is None or not on_cpu(x) or table is None or not first.packed:
        return reference(x, grouped, offsets)
    grouped.bounds(x, offsets)
    offsets = offsets.long()
    out = torch.empty((x.shape[0], first.out_features), dtype=x.dtype)
    _kernel.run(
        out.data_ptr(), x.data_ptr(), table.data_ptr(), offsets.data_ptr(),
        len(grouped), first.out_features, first.in_features, x.stride(0),
        DTYPES[x.dtype], DTYPES[first.dtype], 0 if bias_dtype is None else DTYPES[bias_dtype],
    )  # fmt: skip
    return out
