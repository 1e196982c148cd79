"""Adding what a layer found to what passes through it."""

from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu

SCHEMA = "add_(Tensor(a!) x, Tensor y, float scale=1.0) -> ()"

_kernel = Kernel("add", "pp iiii f ii", elsewhere="torch")


def reference(x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    x.add_(y, alpha=scale)


def add_(x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """x += scale * y in place, rounded once.  x, y [rows, width], y of any dtype that is not wider than x's."""
    if x.shape != y.shape:
        raise ValueError(f"two of one shape asked, found {list(x.shape)} and {list(y.shape)}; nothing is spread here")
    if _kernel.run is None or x.dim() != 2 or not on_cpu(x, y):
        return reference(x, y, scale)
    _kernel.run(
        x.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], x.stride(0), y.stride(0), scale, DTYPES[x.dtype], DTYPES[y.dtype]
    )  # fmt: skip
    return None
