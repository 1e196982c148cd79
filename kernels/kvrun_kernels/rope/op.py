"""Rotary position embedding, in place."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu

SCHEMA = "rope_(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos, Tensor sin, str style='half') -> ()"

STYLES = {"half": 0, "interleaved": 1}

_kernel = Kernel("rope", "pppp iii iiii i i")


def reference(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> None:
    at = positions.long()
    c, s = cos[at].unsqueeze(1), sin[at].unsqueeze(1)
    pairs = cos.shape[1]
    for heads in (q, k):
        rotated = heads[..., : 2 * pairs]
        wide = rotated.float()
        if style == "half":
            a, b = wide[..., :pairs], wide[..., pairs:]
            rotated.copy_(torch.cat((a * c - b * s, b * c + a * s), -1))
        else:
            a, b = wide[..., 0::2], wide[..., 1::2]
            rotated.copy_(torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2))


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> None:
    """Rotate the first R dimensions of every head by the angle of its token's position, in place.

    q [tokens, q_heads, dim] · k [tokens, kv_heads, dim] · positions [tokens] int32 · cos, sin [positions, R/2]
    float32 · style "half" pairs dimension i with i + R/2, "interleaved" pairs 2i with 2i + 1. Views into a fused
    projection are welcome: only the last dimension has to be contiguous.
    """
    if style not in STYLES:
        raise ValueError(f"rope style {style!r} asked, there are {', '.join(STYLES)}; name one of these")
    if 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(f"{2 * cos.shape[1]} dimensions to rotate in heads of {q.shape[-1]}; give cos and sin half as wide")
    run = _kernel.run
    tables = cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()
    if tables and (gpu := _kernel.triton(q, k, cos, sin)):
        for heads in (q, k):
            gpu.rotate(heads, positions, cos, sin, style)
        return None
    if run is None or not (tables and on_cpu(q, k) and positions.dtype == torch.int32):
        return reference(q, k, positions, cos, sin, style)
    for heads in (q, k):
        run(
            heads.data_ptr(), positions.data_ptr(), cos.data_ptr(), sin.data_ptr(), heads.shape[0], heads.shape[1],
            cos.shape[1], heads.stride(0), heads.stride(1), cos.shape[0], STYLES[style], DTYPES[heads.dtype], 0,
        )  # fmt: skip
    return None
