"""Packing what a loader read last: some rows of a weight."""

from collections.abc import Iterator

import torch

from kvrun_kernels.bench import Case
from kvrun_kernels.pack_panels.op import PANEL, pack_panels, reference

ROWS, INPUTS = 1024, 2048


def cases() -> Iterator[Case]:
    for name, rows, k, nibbles in (
        ("bfloat16", torch.ones(ROWS, INPUTS, dtype=torch.bfloat16), 2, False),
        ("int8", torch.ones(ROWS, INPUTS, dtype=torch.int8), 2, False),
        ("4 bits", torch.ones(ROWS, INPUTS, dtype=torch.uint8), 4, True),
    ):
        panels = torch.zeros((ROWS // PANEL, INPUTS // (8 if nibbles else k), PANEL, k), dtype=rows.dtype)
        yield Case(
            f"{name} {ROWS} x {INPUTS}",
            lambda panels=panels, rows=rows, nibbles=nibbles: pack_panels(panels, rows, 0, nibbles=nibbles),
            bytes=rows.nbytes + panels.nbytes,
            beside=lambda panels=panels, rows=rows, nibbles=nibbles: reference(panels, rows, 0, nibbles=nibbles),
        )
