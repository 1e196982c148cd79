"""Making codes of what a loader read last: some rows of a weight of bfloat16."""

from collections.abc import Iterator

import torch

from kvrun_kernels import ops
from kvrun_kernels.bench import Case
from kvrun_kernels.ops import Scheme
from kvrun_kernels.quantize.op import reference

ROWS, INPUTS = 1024, 2048


def cases() -> Iterator[Case]:
    weight = torch.randn(ROWS, INPUTS).to(torch.bfloat16)
    for name, scheme in {
        "int8": Scheme(torch.int8, 127),
        "float8": Scheme(torch.float8_e4m3fn, 448),
        "int4 group 32": Scheme(torch.uint8, group=32),
        "table group 64": Scheme(torch.uint8, group=64, table=torch.linspace(-1, 1, 16)),
    }.items():
        yield Case(
            f"{name} {ROWS} x {INPUTS}",
            lambda scheme=scheme: ops.quantize(weight, scheme),
            bytes=weight.nbytes + weight.numel(),
            beside=lambda scheme=scheme: reference(weight, scheme),
        )
