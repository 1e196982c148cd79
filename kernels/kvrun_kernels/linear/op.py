"""Matrix products with a weight that was packed once, at load, into the layout that the kernel streams."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvrun_kernels import large
from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu
from kvrun_kernels.pack_panels.op import PANEL, pack_panels

SCHEMA = "linear(Tensor x, PackedLinear packed, Tensor? bias=None) -> Tensor"

_kernel = Kernel("linear", "pppp iiii iii", elsewhere="torch")


class PackedLinear:
    """A weight [out_features, in_features], held once: as panels for the native kernel, or as it came.

    Packed, `held` is [panels, inputs / pair, 32, pair]: 32 output rows at a time, stored input by input, so that a thread
    reads one straight stream; bfloat16 keeps adjacent inputs in pairs. Ends are padded with zeros.
    """

    __slots__ = ("held", "in_features", "out_features", "packed")

    def __init__(self, out_features: int, in_features: int, held: Tensor, packed: bool):
        self.out_features = out_features
        self.in_features = in_features
        self.held = held
        self.packed = packed

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return self.held.nbytes

    @property
    def form(self) -> tuple[object, ...] | None:
        """See grouped.Packed."""
        return (self.packed, self.dtype) if self.held.is_contiguous() else None

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """See grouped.Packed."""
        return (self.held,)

    def rows(self, ids: Tensor) -> Tensor:
        """Output rows `ids` of the weight, plain: what an embedding that shares this weight looks up. -> [ids, in]"""
        if not self.packed:
            return self.held[ids]
        return self.held[ids // PANEL, :, ids % PANEL].flatten(-2)[..., : self.in_features]

    def dense(self) -> Tensor:
        """The whole weight as it came; a copy if it was packed. -> [out_features, in_features]"""
        if not self.packed:
            return self.held
        return self.held.transpose(1, 2).flatten(2).flatten(0, 1)[: self.out_features, : self.in_features]


def pack_linear(weight: Tensor) -> PackedLinear:
    """Lay out a weight [out_features, in_features] for `linear`; the caller can let go of it afterwards."""
    out_features, in_features = weight.shape
    if _kernel.run is None or not on_cpu(weight) or 0 in weight.shape:
        return PackedLinear(out_features, in_features, weight, packed=False)
    return pack_rows([weight], out_features, in_features, weight.dtype)


def pack_rows(rows: Iterable[Tensor], out_features: int, in_features: int, dtype: torch.dtype) -> PackedLinear:
    """`pack_linear` of a weight that comes some rows at a time, [rows, in_features] of any type, each needed until the next comes."""
    packed = _kernel.run is not None and on_cpu(torch.empty(0, dtype=dtype)) and 0 not in (out_features, in_features)
    # Pairs of bfloat16 widen to float32 by a shift and a mask, and are what its dot product instruction takes.
    pair = 2 if dtype == torch.bfloat16 else 1
    panels = (-(-out_features // PANEL), -(-in_features // pair), PANEL, pair)
    held = large.zeros(panels, dtype) if packed else torch.empty((out_features, in_features), dtype=dtype)
    at = 0
    for part in rows:
        if packed:
            pack_panels(held, part.to(dtype), at)
        else:
            held[at : at + len(part)] = part
        at += len(part)
    return PackedLinear(out_features, in_features, held, packed)


def reference(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    out = x.float() @ packed.dense().float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by the weight's transpose and add the bias; sums are float32 and rounded once.

    x [rows, in_features] · bias [out_features] · out [rows, out_features], dtype of x. A row's result is the same to
    the bit whatever the number of rows.
    """
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"x of shape [rows, {packed.in_features}] asked, found {list(x.shape)}; reshape it first")
    if not packed.packed:
        if x.dtype != packed.dtype:
            return reference(x, packed, bias)
        return torch.nn.functional.linear(x, packed.held, None if bias is None else bias.to(x.dtype))
    if _kernel.run is None or not on_cpu(x, bias):
        return reference(x, packed, bias)
    out = torch.empty((x.shape[0], packed.out_features), dtype=x.dtype)
    _kernel.run(
        out.data_ptr(), x.data_ptr(), packed.held.data_ptr(), None if bias is None else bias.data_ptr(),
        x.shape[0], packed.out_features, packed.in_features, x.stride(0),
        DTYPES[x.dtype], DTYPES[packed.dtype], 0 if bias is None else DTYPES[bias.dtype],
    )  # fmt: skip
    return out
