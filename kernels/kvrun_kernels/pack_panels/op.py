"""Rows of a weight into the panels that products stream: numbers, codes and scales alike."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import Kernel

SCHEMA = "pack_panels(Tensor(a!) panels, Tensor rows, int first, *, bool nibbles=False) -> ()"

# Output rows in a panel: two AVX-512 vectors, four AVX2 vectors (include/panel.h and include/codes.h say the same).
PANEL = 32
# Where the codes of 4 bits of eight inputs lie in their word, lowest bits first: the even ones in the lower half.
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

_kernel = Kernel("pack_panels", "pp iiiiiii", elsewhere="torch")


def reference(panels: Tensor, rows: Tensor, first: int, *, nibbles: bool = False) -> None:
    held, numbers = panels.view(torch.uint8), rows.contiguous().view(torch.uint8)
    width = held.shape[1] * held.shape[3] * (2 if nibbles else 1)
    numbers = torch.nn.functional.pad(numbers, (0, width - numbers.shape[1]))
    if nibbles:
        ordered = numbers.unflatten(1, (-1, len(NIBBLE_ORDER)))[..., NIBBLE_ORDER]
        numbers = ordered[..., 0::2] | ordered[..., 1::2] << 4
    places = torch.arange(first, first + len(rows))
    held[places // PANEL, :, places % PANEL] = numbers.view(len(rows), held.shape[1], held.shape[3])


def pack_panels(panels: Tensor, rows: Tensor, first: int, *, nibbles: bool = False) -> None:
    """Write rows `first` and on of a weight to their places in its panels, and no other row.

    panels [panels, elements, 32, k], contiguous, 1 to 4 bytes for each k · rows [rows, inputs], the same numbers row by row: k
    of them to an element, zeros where they end before the elements do · nibbles: rows are codes of 4 bits, a byte each, of
    which eight make an element of 4 bytes. ValueError when rows or inputs have no place.
    """
    count, elements, _, k = panels.shape
    inputs = elements * (len(NIBBLE_ORDER) if nibbles else k)
    if first < 0 or first + len(rows) > count * PANEL or rows.shape[1] > inputs:
        found = f"{list(rows.shape)} from row {first}"
        raise ValueError(f"rows within [{count * PANEL}, {inputs}] asked, found {found}; allocate panels for the whole weight")
    run = _kernel.run
    if run is None or not rows.is_cpu or rows.stride(1) != 1:
        return reference(panels, rows, first, nibbles=nibbles)
    size = rows.itemsize
    run(
        panels.data_ptr(), rows.data_ptr(), first, len(rows), elements, panels.itemsize * k, rows.shape[1] * size, rows.stride(0) * size,
        int(nibbles),
    )  # fmt: skip
    return None
