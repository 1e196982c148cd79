"""Rotation against its reference, in place and in views."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.rope.op import reference


def tables(positions: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(positions).float(), 10000 ** -(torch.arange(pairs) / pairs))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("style", ("half", "interleaved"))
@pytest.mark.parametrize("dim,rotated", ((8, 8), (24, 18), (64, 64), (80, 32), (128, 128), (256, 64)))
def test_styles_and_partial_rotations(level, dtype, style, dim, rotated, close):
    cos, sin = tables(500, rotated // 2)
    positions = torch.randint(0, 500, (30,), dtype=torch.int32)
    q, k = torch.randn(30, 4, dim).to(dtype), torch.randn(30, 2, dim).to(dtype)
    expected_q, expected_k = q.clone(), k.clone()
    reference(expected_q, expected_k, positions, cos, sin, style)
    ops.rope_(q, k, positions, cos, sin, style)
    close(q, expected_q)
    close(k, expected_k)
    assert torch.equal(q[..., rotated:], expected_q[..., rotated:])


def test_views_into_a_fused_projection_are_rotated_in_place(level, close):
    cos, sin = tables(64, 8)
    fused = torch.randn(5, (4 + 2 + 2) * 16)
    expected = fused.clone()
    positions = torch.arange(5, dtype=torch.int32)
    for t, op in ((fused, ops.rope_), (expected, reference)):
        op(t[:, :64].unflatten(1, (4, 16)), t[:, 64:96].unflatten(1, (2, 16)), positions, cos, sin)
    close(fused, expected)
    assert torch.equal(fused[:, 96:], expected[:, 96:])


def test_unknown_styles_and_too_many_dimensions_are_refused():
    q, positions = torch.randn(1, 1, 8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="'spiral' asked"):
        ops.rope_(q, q, positions, *tables(4, 4), "spiral")
    with pytest.raises(ValueError, match="10 dimensions to rotate in heads of 8"):
        ops.rope_(q, q, positions, *tables(4, 5))
