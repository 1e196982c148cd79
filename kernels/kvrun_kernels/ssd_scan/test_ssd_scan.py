"""The scan by heads against its definition and against the scan by channels, and its state from chunk to chunk."""

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import ops
from kvrun_kernels.ssd_scan.op import reference


class Batch:
    """Random rows for sequences of so many tokens; everything is a view into wider projections."""

    def __init__(self, tokens, heads, dim, groups, size, dtype=torch.float32):
        rows, self.shape = sum(tokens), (heads, dim, size)
        fused = torch.randn(rows, 2 * heads * dim + 2 * groups * size + heads + 3).to(dtype)
        x, z, b, c, self.dt, _ = fused.split([heads * dim, heads * dim, groups * size, groups * size, heads, 3], dim=1)
        self.x, self.z = x.unflatten(1, (heads, dim)), z.unflatten(1, (heads, dim))
        self.b, self.c = b.unflatten(1, (groups, size)), c.unflatten(1, (groups, size))
        self.a, self.d, self.dt_bias = -torch.rand(heads) * 4 - 0.01, torch.randn(heads), torch.randn(heads)
        self.starts = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def run(self, state, slots, fresh, op=ops.ssd_scan, z=True, rows=None, starts=None, **limits):
        x, dt, b, c, gate = (t if rows is None else t[rows] for t in (self.x, self.dt, self.b, self.c, self.z))
        starts = self.starts if starts is None else torch.tensor(starts, dtype=torch.int32)
        slots, fresh = torch.tensor(slots, dtype=torch.int32), torch.tensor(fresh)
        return op(x, dt, self.a, b, c, self.d, self.dt_bias, starts, slots, fresh, state, gate if z else None, **limits)


@pytest.mark.parametrize("heads,dim,groups,size", ((1, 1, 1, 1), (4, 16, 1, 32), (6, 20, 2, 7), (20, 8, 4, 16), (3, 33, 3, 40)))
@pytest.mark.parametrize("options", ({}, {"z": False, "least": 0.2, "most": 0.8}), ids=("gated", "limited"))
def test_ragged_sequences_with_and_without_a_past(level, dtype, heads, dim, groups, size, options, close):
    batch = Batch((1, 9, 0, 2, 3), heads, dim, groups, size, dtype)
    state = torch.randn(6, heads, dim, size)
    expected_state = state.clone()
    table = ((4, 0, 1, 3, 5), (False, True, True, False, True))
    close(batch.run(state, *table, **options), batch.run(expected_state, *table, op=reference, **options), factor=2)
    close(state, expected_state)
    assert torch.equal(state[1:3], expected_state[1:3])


def test_a_head_is_channels_that_decay_alike(level, close):
    batch = Batch((12,), 4, 6, 1, 16)
    state = torch.randn(1, 4, 6, 16)
    flat = state.view(1, 24, 16).clone()
    found = batch.run(state, (0,), (False,), z=False)
    alike = ops.selective_scan(
        batch.x.flatten(1), batch.dt.repeat_interleave(6, dim=1), batch.a.repeat_interleave(6)[:, None].expand(24, 16).contiguous(),
        batch.b[:, 0], batch.c[:, 0], batch.d.repeat_interleave(6), batch.dt_bias.repeat_interleave(6),
        batch.starts, torch.tensor([0], dtype=torch.int32), torch.tensor([False]), flat,
    )  # fmt: skip
    close(found.flatten(1), alike)
    close(state.view_as(flat), flat)


def test_chunks_neighbours_and_threads_never_change_a_row(level, dtype):
    batch = Batch((90,), 4, 24, 2, 16, dtype)
    whole = torch.full((1, *batch.shape), float("nan"))
    expected = batch.run(whole, (0,), (True,))
    threads = kvrun_kernels.get_num_threads()
    try:
        for count, chunk in ((1, 1), (2, 7), (3, 40)):
            kvrun_kernels.set_num_threads(count)
            state = torch.randn(3, *batch.shape)
            for start in range(0, 90, chunk):
                stop = min(start + chunk, 90)
                rows = torch.tensor([0, 1, *range(start, stop)])
                found = batch.run(state, (0, 2), (True, start == 0), rows=rows, starts=(0, 2, 2 + stop - start))
                assert torch.equal(found[2:], expected[start:stop]) and torch.equal(found[:2], expected[:2])
            assert torch.equal(state[2], whole[0])
    finally:
        kvrun_kernels.set_num_threads(threads)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"state \[slots, 4, 8, 16\] in float32"):
        Batch((1,), 4, 8, 2, 16).run(torch.zeros(1, 4, 8, 15), (0,), (True,))
    with pytest.raises(ValueError, match="3 heads over 2 groups"):
        Batch((1,), 3, 8, 2, 16).run(torch.zeros(1, 3, 8, 16), (0,), (True,))
