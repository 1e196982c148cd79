"""Triton's short convolution against the reference, and its state from chunk to chunk."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.causal_conv.op import reference


@pytest.mark.parametrize("channels,taps", ((1, 1), (70, 4), (16, 9)))
@pytest.mark.parametrize("act", (None, "silu"))
def test_ragged_sequences_with_and_without_a_past(device, dtype, channels, taps, act, close):
    weight, bias = torch.randn(channels, taps), torch.randn(channels)
    state = torch.randn(6, channels, taps - 1)
    state[3] = float("nan")
    expected_state, x = state.clone(), torch.randn(15, channels + 3).to(dtype)[:, 2 : 2 + channels]
    starts = torch.tensor([0, 1, 10, 10, 12, 15], dtype=torch.int32)
    slots, fresh = torch.tensor([4, 0, 1, 3, 5], dtype=torch.int32), torch.tensor([False, False, True, True, False])
    found = ops.causal_conv(x, weight, bias, starts, slots, fresh, state, act)
    close(found, reference(x, weight, bias, starts, slots, fresh, expected_state, act))
    assert torch.equal(state, expected_state)


def test_chunks_and_neighbours_never_change_a_row(device, dtype):
    x, weight, whole = torch.randn(12, 20).to(dtype), torch.randn(20, 4), torch.zeros(1, 20, 3)
    one = (torch.tensor([0, 12], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.tensor([True]))
    expected = ops.causal_conv(x, weight, None, *one, whole, "silu")
    state = torch.randn(3, 20, 3)
    for start, stop in ((0, 2), (2, 3), (3, 12)):
        starts = torch.tensor([0, 2, 2 + stop - start], dtype=torch.int32)
        rows = torch.cat((x[:2], x[start:stop]))
        table = (starts, torch.tensor([0, 2], dtype=torch.int32), torch.tensor([True, start == 0]))
        assert torch.equal(ops.causal_conv(rows, weight, None, *table, state, "silu")[2:], expected[start:stop])
    assert torch.equal(state[2], whole[0])
