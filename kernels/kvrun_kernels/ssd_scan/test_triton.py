"""Triton's scan by heads against its definition, and its state from chunk to chunk."""

import pytest
import torch

from kvrun_kernels.ssd_scan.op import reference
from kvrun_kernels.ssd_scan.test_ssd_scan import Batch


@pytest.mark.parametrize("heads,dim,groups,size", ((1, 1, 1, 1), (6, 20, 2, 7), (3, 33, 3, 40)))
@pytest.mark.parametrize("options", ({}, {"z": False, "least": 0.2, "most": 0.8}), ids=("gated", "limited"))
def test_ragged_sequences_with_and_without_a_past(device, dtype, heads, dim, groups, size, options, close):
    batch = Batch((1, 9, 0, 2, 3), heads, dim, groups, size, dtype)
    state = torch.randn(6, heads, dim, size)
    state[3] = float("nan")
    expected = state.clone()
    table = ((4, 0, 1, 3, 5), (False, True, True, True, False))
    close(batch.run(state, *table, **options), batch.run(expected, *table, op=reference, **options), factor=2)
    torch.testing.assert_close(state, expected, rtol=4e-5, atol=4e-5)
    assert torch.equal(state[1:3], expected[1:3])


def test_chunks_never_change_a_row(device):
    batch, state, whole = Batch((12,), 4, 16, 2, 8), torch.zeros(1, 4, 16, 8), torch.zeros(1, 4, 16, 8)
    expected = batch.run(whole, (0,), (True,))
    for start, stop in ((0, 1), (1, 7), (7, 12)):
        found = batch.run(state, (0,), (False,), rows=slice(start, stop), starts=(0, stop - start))
        assert torch.equal(found, expected[start:stop])
    assert torch.equal(state, whole)
