"""How page pools keep a vector of numbers: plainly, as floats of 8 bits, or as int8 codes with the scale that they share."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES

# The codes that the C++ side knows formats by (include/stored_rows.h).
FORMATS = {**DTYPES, torch.float8_e4m3fn: 3, torch.float8_e5m2: 4, torch.int8: 5}

SCALE_BYTES = 4  # of the float32 that ends a row of int8 codes


def stored_width(dim: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` that a vector of `dim` numbers takes in a pool: the last dimension of its shape."""
    return dim + SCALE_BYTES if dtype == torch.int8 else dim


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as a pool of `dtype` keeps them. x [..., dim] · out [..., stored_width].

    8-bit floats: the nearest code, of two the even one, the largest for what is beyond · int8: multiples of a 127th of the
    row's largest magnitude. What is not finite becomes NaN, in int8 with all of its row.
    """
    if dtype in DTYPES:
        return x.to(dtype)
    x = x.float()
    if dtype != torch.int8:
        most = torch.finfo(dtype).max
        return torch.where(x.isfinite(), x.clamp(-most, most), float("nan")).to(dtype)
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = (x / scale).round().clamp(-127, 127).where(scale > 0, 0.0)
    whole = x.isfinite().all(-1, keepdim=True)
    codes, scale = codes.where(whole, 0.0), scale.where(whole, float("nan"))
    return torch.cat((codes.to(torch.int8), scale.view(torch.int8)), dim=-1)


def widen(rows: Tensor) -> Tensor:
    """The numbers of a pool's rows. rows [..., stored_width] · out [..., dim] float32."""
    if rows.dtype != torch.int8:
        return rows.float()
    return rows[..., :-SCALE_BYTES].float() * rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)


def as_held(pool: Tensor) -> Tensor:
    """The same pool as Triton code takes it: numbers of 8 bits as bytes, for not every GPU knows their dtypes."""
    return pool if pool.dtype in DTYPES else pool.view(torch.uint8)


def holds(pool: Tensor) -> bool:
    """Whether native code can read and write a pool: on the CPU, in a format that is known, without gaps."""
    return pool.is_cpu and pool.dtype in FORMATS and pool.is_contiguous()
