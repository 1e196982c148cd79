"""The scan against its definition, and its state from chunk to chunk."""

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import ops
from kvrun_kernels.selective_scan.op import reference


class Batch:
    """Random rows for sequences of so many tokens; x, dt, b, c and z are views into wider projections."""

    def __init__(self, tokens, channels, size, dtype=torch.float32, dt_dtype=None):
        rows = sum(tokens)
        self.x, self.z = torch.randn(rows, 2 * channels + 3).to(dtype)[:, 1 : 2 * channels + 1].split(channels, dim=1)
        self.dt = torch.randn(rows, channels).to(dt_dtype or dtype)
        self.b, self.c = torch.randn(rows, 2 * size + 5).to(dtype)[:, 5:].split(size, dim=1)
        self.a, self.d, self.dt_bias = -torch.rand(channels, size) * 4 - 0.01, torch.randn(channels), torch.randn(channels)
        self.starts = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def run(self, state, slots, fresh, op=ops.selective_scan, z=True, rows=None, starts=None):
        x, dt, b, c, gate = (t if rows is None else t[rows] for t in (self.x, self.dt, self.b, self.c, self.z))
        starts = self.starts if starts is None else torch.tensor(starts, dtype=torch.int32)
        slots, fresh = torch.tensor(slots, dtype=torch.int32), torch.tensor(fresh)
        return op(x, dt, self.a, b, c, self.d, self.dt_bias, starts, slots, fresh, state, gate if z else None)


@pytest.mark.parametrize("channels,size", ((1, 1), (20, 16), (37, 5), (64, 8), (48, 33)))
@pytest.mark.parametrize("z", (False, True), ids=("plain", "gated"))
def test_ragged_sequences_with_and_without_a_past(level, dtype, channels, size, z, close):
    batch = Batch((1, 9, 0, 2, 3), channels, size, dtype)
    state = torch.randn(6, channels, size)
    expected_state = state.clone()
    table = ((4, 0, 1, 3, 5), (False, True, True, False, True))
    close(batch.run(state, *table, z=z), batch.run(expected_state, *table, op=reference, z=z), factor=2)
    close(state, expected_state)
    assert torch.equal(state[1:3], expected_state[1:3])


def test_a_wider_step_is_read_as_it_is(level, close):
    batch = Batch((7,), 40, 16, torch.bfloat16, dt_dtype=torch.float32)
    state = torch.randn(1, 40, 16)
    expected_state = state.clone()
    found = batch.run(state, (0,), (False,))
    close(found, batch.run(expected_state, (0,), (False,), op=reference))
    close(state, expected_state)


def test_steps_of_every_size(level, close):
    batch = Batch((1,), 161, 4)
    batch.dt, batch.dt_bias = torch.linspace(-100, 60, 161)[None], torch.zeros(161)
    state = torch.randn(1, 161, 4)
    expected_state = state.clone()
    found = batch.run(state, (0,), (False,))
    close(found, batch.run(expected_state, (0,), (False,), op=reference), factor=2)
    close(state, expected_state, factor=2)


def test_chunks_neighbours_and_threads_never_change_a_row(level, dtype):
    batch = Batch((90,), 70, 16, dtype)
    whole = torch.full((1, 70, 16), float("nan"))
    expected = batch.run(whole, (0,), (True,))
    threads = kvrun_kernels.get_num_threads()
    try:
        for count, chunk in ((1, 1), (2, 7), (3, 40)):
            kvrun_kernels.set_num_threads(count)
            state = torch.randn(3, 70, 16)
            for start in range(0, 90, chunk):
                stop = min(start + chunk, 90)
                rows = torch.tensor([0, 1, *range(start, stop)])
                found = batch.run(state, (0, 2), (True, start == 0), rows=rows, starts=(0, 2, 2 + stop - start))
                assert torch.equal(found[2:], expected[start:stop]) and torch.equal(found[:2], expected[:2])
            assert torch.equal(state[2], whole[0])
    finally:
        kvrun_kernels.set_num_threads(threads)


def test_a_narrow_state_is_refused():
    with pytest.raises(ValueError, match=r"state \[slots, 8, 4\] in float32"):
        Batch((1,), 8, 4).run(torch.zeros(1, 8, 4, dtype=torch.bfloat16), (0,), (True,))
