"""Triton's low-rank updates against the reference: mixed ranks, empty segments, odd widths, 1 to 133 rows, tables that stay in place."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.ops import LoraSegments, LoraTable, Segment
from kvrun_kernels.sgmv.op import reference
from kvrun_kernels.sgmv.test_sgmv import check_strides_and_mixed_dtypes

RANKS = (1, 3, 8, 16, 40, 64)


def adapter(n: int, inputs: int, columns: int, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rank = RANKS[n % len(RANKS)]
    return (torch.randn(rank, inputs) / inputs**0.5).to(dtype), (torch.randn(rank, columns) / rank**0.5).to(dtype)


def mixed(places, inputs: int, parts, dtype) -> LoraSegments:
    """An adapter of another rank for each (start, stop) of rows, each changing all parts (column, columns)."""
    return LoraSegments(
        Segment(start, stop, *adapter(n, inputs, columns, dtype), column)
        for n, (start, stop) in enumerate(places)
        for column, columns in parts
    )


def check(close, rows: int, width: int, segments: LoraSegments, dtype) -> None:
    x, y = torch.randn(rows, segments.inputs).to(dtype), torch.randn(rows, width).to(dtype)
    expected = y.clone()
    reference(expected, x, segments)
    ops.lora(y, x, segments)
    close(y, expected, factor=2)


@pytest.mark.parametrize(
    "rows,places",
    (
        (1, ((0, 1),)),
        (5, ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))),
        (33, ((0, 17), (17, 17), (20, 33))),
        (133, ((0, 1), (1, 40), (40, 40), (41, 133))),
    ),
    ids=str,
)
def test_mixed_ranks_and_empty_segments(device, dtype, rows, places, close):
    check(close, rows, 110, mixed(places, 100, ((0, 40), (40, 24), (90, 17)), dtype), dtype)


@pytest.mark.parametrize("inputs,columns", ((1, 1), (7, 3), (128, 128), (1100, 130), (2050, 64)))
def test_odd_widths_and_inputs_cut_among_programs(device, dtype, inputs, columns, close):
    check(close, 3, columns, mixed(((0, 1), (1, 3)), inputs, ((0, columns),), dtype), dtype)


def test_rows_alone_and_in_a_run_have_the_same_bits(device, dtype):
    a, bt = adapter(3, 150, 70, dtype)
    x, y = torch.randn(18, 150).to(dtype), torch.randn(18, 70).to(dtype)
    together, apart = y.clone(), y.clone()
    ops.lora(together, x, LoraSegments([Segment(0, 18, a, bt, 0)]))
    chosen = [0, 1, 15, 16, 17]
    ops.lora(apart, x, LoraSegments(Segment(i, i + 1, a, bt, 0) for i in chosen))
    assert torch.equal(together[chosen], apart[chosen]) and not torch.equal(together, y)


def test_rows_and_columns_outside_every_segment_stay_untouched(device, dtype):
    y = torch.randn(6, 30).to(dtype)
    before = y.clone()
    ops.lora(y, torch.ones(6, 8, dtype=dtype), LoraSegments([Segment(2, 4, torch.ones(2, 8).to(dtype), torch.ones(2, 10).to(dtype), 5)]))
    inside = torch.zeros(6, 30, dtype=torch.bool)
    inside[2:4, 5:15] = True
    assert torch.equal(y[~inside], before[~inside]) and not (y[inside] == before[inside]).any()


def test_strides_and_adapters_of_another_dtype(device, close):
    check_strides_and_mixed_dtypes(close)


def test_joined_parts_say_the_same_as_segments_written_out(device, close):
    adapters = [[(*adapter(n, 50, 30, torch.float32), column) for column in (0, 40)] for n in range(3)]
    parts = [LoraSegments(Segment(0, 1, a, bt, column) for a, bt, column in found) for found in adapters]
    check(close, 9, 70, LoraSegments.joined((part, *place) for part, place in zip(parts, ((0, 4), (4, 5), (7, 9)))), torch.float32)


def test_a_table_filled_in_place_serves_batch_after_batch(device, dtype, close):
    parts = ((0, 40), (40, 24))
    batches = [mixed(places, 64, parts, dtype) for places in (((0, 8),), ((0, 1), (1, 2), (2, 3), (3, 7)), (), ((5, 8),))]
    table = LoraTable(batches[0], items=16, updates=8, columns=70)
    where, grid = table.held.data_ptr(), (table.items, table.updates, table.columns)
    for segments in batches:
        table.fill(segments)
        x, y = torch.randn(8, 64).to(dtype), torch.randn(8, 70).to(dtype)
        expected = y.clone()
        reference(expected, x, segments)
        ops.lora(y, x, table)
        close(y, expected, factor=2)
    assert where == table.held.data_ptr() and grid == (table.items, table.updates, table.columns)


def test_what_a_table_has_no_room_for_is_refused(device):
    table = LoraTable(mixed(((0, 1),), 64, ((0, 40),), torch.float32))
    with pytest.raises(ValueError, match=r"room for \(1, 1, 40\) items, updates and columns; found \(2, 2, 40\)"):
        table.fill(mixed(((0, 1), (1, 2)), 64, ((0, 40),), torch.float32))
    with pytest.raises(ValueError, match=r"found segments over 63 of torch\.float32"):
        table.fill(mixed(((0, 1),), 63, ((0, 40),), torch.float32))
    with pytest.raises(ValueError, match="which only Triton on a GPU does"):
        ops.lora(torch.zeros(1, 40).double(), torch.zeros(1, 64).double(), table)
