"""Adapters of mixed ranks in one batch, over the popularity mixes that Punica was tested with."""

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import ops
from kvrun_kernels.ops import LoraSegments, Segment
from kvrun_kernels.sgmv.op import reference

RANKS = (1, 3, 8, 16, 64)
BATCHES = (1, 2, 3, 5, 8, 16, 33, 64, 133)
POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed")


def adapters_of_rows(popularity: str, rows: int) -> list[int]:
    """Which adapter each row of a batch wants, rows of one adapter being adjacent."""
    if popularity == "identical":
        return [0] * rows
    if popularity == "distinct":
        return list(range(rows))
    count = max(1, round(rows**0.5))
    if popularity == "uniform":
        return sorted(i % count for i in range(rows))
    weights = torch.arange(1, count + 1, dtype=torch.float) ** -1.5
    if popularity == "skewed":
        weights = torch.cat((torch.tensor([8.0]), torch.ones(count - 1)))
    return sorted(torch.multinomial(weights, rows, replacement=True).tolist())


def runs(wanted: list[int]) -> list[tuple[int, int, int]]:
    """(start, stop, adapter) of every run of equal neighbours."""
    edges = [i for i in range(len(wanted)) if i == 0 or wanted[i] != wanted[i - 1]]
    return [(a, b, wanted[a]) for a, b in zip(edges, [*edges[1:], len(wanted)])]


def weights(adapter: int, inputs: int, columns: int, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rank = RANKS[adapter % len(RANKS)]
    return (torch.randn(rank, inputs) / inputs**0.5).to(dtype), (torch.randn(rank, columns) / rank**0.5).to(dtype)


@pytest.mark.punica_test
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_mixed_ranks_under_every_popularity(level, dtype, popularity, batch, close):
    inputs, parts = 100, ((0, 40), (40, 24), (90, 17))
    wanted = adapters_of_rows(popularity, batch)
    held = {n: [weights(n, inputs, columns, dtype) for _, columns in parts] for n in set(wanted)}
    segments = LoraSegments(
        Segment(start, stop, a, bt, column) for start, stop, n in runs(wanted) for (column, _), (a, bt) in zip(parts, held[n])
    )
    x, y = torch.randn(batch, inputs).to(dtype), torch.randn(batch, 110).to(dtype)
    expected = y.clone()
    reference(expected, x, segments)
    ops.lora(y, x, segments)
    close(y, expected, factor=2)


@pytest.mark.punica_test
@pytest.mark.parametrize("rank", RANKS)
def test_rows_alone_and_in_a_run_have_the_same_bits(level, dtype, rank):
    # Enough for tiles, with one thread and with several.
    rows, inputs, columns = 133, 333, 1100
    a, bt = torch.randn(rank, inputs).to(dtype), torch.randn(rank, columns).to(dtype)
    x, y = torch.randn(rows, inputs).to(dtype), torch.randn(rows, columns).to(dtype)
    together, apart = y.clone(), y.clone()
    ops.lora(together, x, LoraSegments([Segment(0, rows, a, bt, 0)]))
    ops.lora(apart, x, LoraSegments(Segment(i, i + 1, a, bt, 0) for i in range(rows)))
    assert torch.equal(together, apart)
    for start, stop in ((0, 1), (5, 7), (11, 36), (3, 100)):
        alone = y[start:stop].clone()
        ops.lora(alone, x[start:stop], LoraSegments([Segment(0, stop - start, a, bt, 0)]))
        assert torch.equal(alone, together[start:stop])


@pytest.mark.punica_test
def test_threads_never_change_a_result(level):
    x, y = torch.randn(20, 512), torch.randn(20, 3000)
    segments = LoraSegments(Segment(i, i + 2, *weights(i, 512, 3000, torch.float32), 0) for i in range(0, 20, 2))
    found = []
    threads = kvrun_kernels.get_num_threads()
    for count in (1, 2, 3):
        kvrun_kernels.set_num_threads(count)
        found.append(y.clone())
        ops.lora(found[-1], x, segments)
    kvrun_kernels.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.punica_test
def test_rows_and_columns_outside_every_segment_stay_untouched(level, dtype):
    y = torch.randn(6, 30).to(dtype)
    before = y.clone()
    a, bt = torch.ones(2, 8, dtype=dtype), torch.ones(2, 10, dtype=dtype)
    ops.lora(y, torch.ones(6, 8, dtype=dtype), LoraSegments([Segment(2, 4, a, bt, 5)]))
    inside = torch.zeros(6, 30, dtype=torch.bool)
    inside[2:4, 5:15] = True
    assert torch.equal(y[~inside], before[~inside])
    assert not (y[inside] == before[inside]).any()


@pytest.mark.punica_test
def test_empty_segments_and_none_at_all(level):
    y = torch.zeros(3, 4)
    a, bt = torch.ones(1, 2), torch.ones(1, 4)
    ops.lora(y, torch.ones(3, 2), LoraSegments([]))
    ops.lora(y, torch.ones(3, 2), LoraSegments([Segment(0, 0, a, bt, 0), Segment(1, 2, a, bt, 0), Segment(3, 3, a, bt, 0)]))
    assert y.tolist() == [[0] * 4, [2] * 4, [0] * 4]


def check_strides_and_mixed_dtypes(close):
    """An update of rows with gaps, by an adapter of another dtype, on whatever serves the op."""
    y, x = torch.randn(5, 64).to(torch.bfloat16)[:, :50], torch.randn(5, 40)[:, :33].to(torch.bfloat16)
    segments = LoraSegments([Segment(1, 4, torch.randn(7, 33), torch.randn(7, 20), 30)])
    expected = y.clone()
    reference(expected, x, segments)
    ops.lora(y, x, segments)
    close(y.contiguous(), expected.contiguous(), factor=2)


@pytest.mark.punica_test
def test_rows_with_strides_and_mixed_dtypes(level, close):
    check_strides_and_mixed_dtypes(close)


@pytest.mark.punica_test
def test_joined_parts_say_the_same_as_segments_written_out(level):
    x, y = torch.randn(9, 50), torch.randn(9, 70)
    adapters = [[(*weights(n, 50, 30, torch.float32), column) for column in (0, 40)] for n in range(3)]
    places = ((0, 4), (4, 5), (7, 9))
    written = LoraSegments(Segment(*place, a, bt, column) for place, parts in zip(places, adapters) for a, bt, column in parts)
    parts = [LoraSegments(Segment(0, 1, a, bt, column) for a, bt, column in parts) for parts in adapters]
    joined = LoraSegments.joined((part, *place) for part, place in zip(parts, places))
    found, again, expected = y.clone(), y.clone(), y.clone()
    ops.lora(expected, x, written)
    ops.lora(found, x, joined)
    reference(again, x, joined)
    assert torch.equal(found, expected)
    torch.testing.assert_close(again, expected, rtol=2e-5, atol=2e-5)
    assert len(joined) == len(written) == 6


@pytest.mark.punica_test
def test_segments_that_do_not_fit_are_refused():
    a, bt = torch.ones(2, 8), torch.ones(2, 4)
    with pytest.raises(ValueError, match="reach row 9"):
        ops.lora(torch.zeros(3, 4), torch.zeros(3, 8), LoraSegments([Segment(0, 9, a, bt, 0)]))
    with pytest.raises(ValueError, match="read 8 inputs"):
        ops.lora(torch.zeros(3, 4), torch.zeros(3, 7), LoraSegments([Segment(0, 3, a, bt, 0)]))
    with pytest.raises(ValueError, match=r"bt \[rank"):
        LoraSegments([Segment(0, 3, a, torch.ones(3, 4), 0)])
