"""Products of grouped rows, each group with codes of its own: the quantized experts of a mixture in one call."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import Kernel, on_cpu
from kvrun_kernels.grouped import Grouped, owned
from kvrun_kernels.quantized_linear.op import PackedQuantized, described, quantized_linear
from kvrun_kernels.quantized_linear.rows import QuantizedRows

SCHEMA = "grouped_quantized_linear(Tensor x, Grouped[PackedQuantized] grouped, Tensor offsets, *, bool rounded=False) -> Tensor"

# Its native code is in quantized_linear/cpu.cpp, for which one weight is one group.
_kernel = Kernel("grouped_quantized_linear", "pppp iiii iiiiiiii")


def reference(x: Tensor, grouped: Grouped[PackedQuantized], offsets: Tensor, *, rounded: bool = False) -> Tensor:
    parts = [
        quantized_linear(rows, grouped.packed[g], grouped.bias(g), rounded=rounded) for g, rows in owned(x, grouped.bounds(x, offsets))
    ]
    return torch.cat(parts) if parts else x.new_empty((0, grouped.first.out_features))


def grouped_quantized_linear(x: Tensor, grouped: Grouped[PackedQuantized], offsets: Tensor, *, rounded: bool = False) -> Tensor:
    """Multiply each group's rows by the transpose of what its own codes stand for, as `quantized_linear` does, to the bit on CPUs.

    x [rows, in_features], rows of one group adjacent · offsets [groups + 1] integers: group g owns rows offsets[g] to
    offsets[g + 1], all rows are owned · out [rows, out_features], dtype of x. A group without rows costs nothing.
    """
    first, table = grouped.first, grouped.table
    grouped.check(x)
    # On a GPU nobody looks at the offsets' values: that would wait for all that runs there.
    if (gpu := _kernel.triton(x)) and table is not None and len(offsets) == len(grouped) + 1:
        return gpu.grouped_quantized_linear(x, grouped, offsets, rounded=rounded)
    if _kernel.run is None or not on_cpu(x) or table is None or isinstance(first, QuantizedRows):
        return reference(x, grouped, offsets, rounded=rounded)
    grouped.bounds(x, offsets)
    offsets = offsets.long()
    out = torch.empty((x.shape[0], first.out_features), dtype=x.dtype)
    _kernel.run(
        out.data_ptr(), x.data_ptr(), table.data_ptr(), offsets.data_ptr(),
        len(grouped), first.out_features, first.in_features, x.stride(0), *described(x, first, grouped.bias_dtype, rounded),
    )  # fmt: skip
    return out
