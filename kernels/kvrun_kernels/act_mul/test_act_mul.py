"""Activations against PyTorch's, over the whole range where they bend."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.act_mul.op import ACTS, act_mul_reference, activation_reference


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows,width", ((1, 1), (3, 37), (2, 11008)))
def test_gated(level, dtype, act, rows, width, close):
    gate_up = 4 * torch.randn(rows, 2 * width).to(dtype)
    close(ops.act_mul(gate_up, act), act_mul_reference(gate_up, act))


@pytest.mark.parametrize("act", ACTS)
def test_alone_over_its_range(level, dtype, act, close):
    x = torch.cat((torch.linspace(-12, 12, 5001), torch.tensor([0.0, -0.0, 90.0, -90.0, 200.0, -200.0]))).to(dtype)
    close(ops.activation(x[None], act), activation_reference(x[None], act))


@pytest.mark.parametrize("act", ACTS)
def test_what_is_no_number_stays_visible(level, act):
    assert ops.activation(torch.full((1, 3), float("nan")), act).isnan().all()


def test_unknown_names_and_odd_widths_are_refused():
    with pytest.raises(ValueError, match="'swish9' asked"):
        ops.activation(torch.zeros(1, 2), "swish9")
    with pytest.raises(ValueError, match="found 3 columns"):
        ops.act_mul(torch.zeros(1, 3), "silu")
