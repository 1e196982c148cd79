"""Triton's scan by channels against its definition, and its state from chunk to chunk."""

import pytest
import torch

from kvrun_kernels.selective_scan.op import reference
from kvrun_kernels.selective_scan.test_selective_scan import Batch


@pytest.mark.parametrize("channels,size", ((1, 1), (70, 16), (37, 5)))
@pytest.mark.parametrize("z", (False, True), ids=("plain", "gated"))
def test_ragged_sequences_with_and_without_a_past(device, dtype, channels, size, z, close):
    batch = Batch((1, 9, 0, 2, 3), channels, size, dtype)
    state = torch.randn(6, channels, size)
    state[3] = float("nan")
    expected = state.clone()
    table = ((4, 0, 1, 3, 5), (False, True, True, True, False))
    close(batch.run(state, *table, z=z), batch.run(expected, *table, op=reference, z=z), factor=2)
    torch.testing.assert_close(state, expected, rtol=4e-5, atol=4e-5)
    assert torch.equal(state[1:3], expected[1:3])


def test_chunks_never_change_a_row(device):
    batch, state, whole = Batch((12,), 20, 16), torch.zeros(1, 20, 16), torch.zeros(1, 20, 16)
    expected = batch.run(whole, (0,), (True,))
    for start, stop in ((0, 1), (1, 7), (7, 12)):
        found = batch.run(state, (0,), (False,), rows=slice(start, stop), starts=(0, stop - start))
        assert torch.equal(found, expected[start:stop])
    assert torch.equal(state, whole)
