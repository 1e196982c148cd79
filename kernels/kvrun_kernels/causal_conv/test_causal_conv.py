"""The short convolution against PyTorch's, and its state from chunk to chunk."""

import pytest
import torch
from torch.nn import functional

import kvrun_kernels
from kvrun_kernels import ops
from kvrun_kernels.causal_conv.op import reference


def ragged(tokens, slots, fresh):
    starts = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return starts, torch.tensor(slots, dtype=torch.int32), torch.tensor(fresh)


@pytest.mark.parametrize("channels,taps", ((1, 1), (7, 4), (70, 4), (33, 2), (16, 9)))
@pytest.mark.parametrize("act", (None, "silu"))
@pytest.mark.parametrize("narrow", (False, True), ids=("wide", "narrow"))
def test_ragged_sequences_with_and_without_a_past(level, dtype, channels, taps, act, narrow, close):
    weight, bias = torch.randn(channels, taps), torch.randn(channels)
    weight, bias = (weight.to(dtype), bias.to(dtype)) if narrow else (weight, bias)
    state = torch.randn(6, channels, taps - 1).to(dtype if narrow else torch.float32)
    expected_state, x = state.clone(), torch.randn(15, channels + 3).to(dtype)[:, 2 : 2 + channels]
    table = ragged((1, 9, 0, 2, 3), (4, 0, 1, 3, 5), (False, True, True, False, True))
    found = ops.causal_conv(x, weight, bias, *table, state, act)
    close(found, reference(x, weight, bias, *table, expected_state, act))
    assert torch.equal(state, expected_state)
    close(ops.causal_conv(x, weight, None, *table, state), reference(x, weight, None, *table, expected_state))


def test_one_whole_sequence_is_the_padded_convolution(level, dtype, close):
    x, weight, bias = torch.randn(50, 20).to(dtype), torch.randn(20, 4), torch.randn(20)
    found = ops.causal_conv(x, weight, bias, *ragged((50,), (0,), (True,)), torch.full((1, 20, 3), float("nan")))
    expected = functional.conv1d(x.float().T[None], weight.unsqueeze(1), bias, padding=3, groups=20)[0, :, :50].T
    close(found, expected.to(dtype))


def test_chunks_neighbours_and_threads_never_change_a_row(level, dtype):
    x, weight, bias = torch.randn(90, 150).to(dtype), torch.randn(150, 4), torch.randn(150)
    whole = torch.zeros(1, 150, 3)
    expected = ops.causal_conv(x, weight, bias, *ragged((90,), (0,), (True,)), whole, "silu")
    threads = kvrun_kernels.get_num_threads()
    try:
        for count, chunk in ((1, 1), (2, 7), (3, 40)):
            kvrun_kernels.set_num_threads(count)
            state = torch.randn(3, 150, 3)
            for start in range(0, 90, chunk):
                rows = x[start : start + chunk]
                table = ragged((2, len(rows)), (0, 2), (True, start == 0))
                found = ops.causal_conv(torch.cat((x[:2], rows)), weight, bias, *table, state, "silu")
                assert torch.equal(found[2:], expected[start : start + chunk]) and torch.equal(found[:2], expected[:2])
            assert torch.equal(state[2], whole[0])
    finally:
        kvrun_kernels.set_num_threads(threads)


def test_what_does_not_fit_is_refused():
    table = ragged((1,), (0,), (True,))
    with pytest.raises(ValueError, match="state"):
        ops.causal_conv(torch.zeros(1, 3), torch.zeros(3, 4), None, *table, torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="'gelu' asked"):
        ops.causal_conv(torch.zeros(1, 3), torch.zeros(3, 4), None, *table, torch.zeros(1, 3, 3), "gelu")
