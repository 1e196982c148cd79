"""Triton's rotation against the reference, in place and in views."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.rope.op import reference


@pytest.mark.parametrize("style", ("half", "interleaved"))
@pytest.mark.parametrize("tokens,dim,rotated", ((0, 8, 8), (5, 8, 8), (3, 24, 18), (7, 16, 6), (2, 128, 128)))
def test_views_into_a_fused_projection(device, dtype, style, tokens, dim, rotated, close):
    angles = torch.outer(torch.arange(500).float(), 10000 ** -(torch.arange(rotated // 2) / (rotated // 2)))
    positions = torch.randint(0, 500, (tokens,), dtype=torch.int32)
    fused = torch.randn(tokens, 8 * dim).to(dtype)
    expected = fused.clone()
    for t, op in ((fused, ops.rope_), (expected, reference)):
        q, k = t[:, : 5 * dim].unflatten(1, (5, dim)), t[:, 5 * dim : 7 * dim].unflatten(1, (2, dim))
        op(q, k, positions, angles.cos(), angles.sin(), style)
    close(fused, expected)
    assert torch.equal(fused[:, 7 * dim :], expected[:, 7 * dim :])
    assert torch.equal(fused.unflatten(1, (8, dim))[..., rotated:], expected.unflatten(1, (8, dim))[..., rotated:])
