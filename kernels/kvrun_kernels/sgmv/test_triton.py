"""Triton's low-rank updates against the reference: mixed ranks, empty segments, odd widths, 1 to 133 rows, tables that stay in place."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.ops import LoraPointers, LoraSegments, LoraSites, LoraTable, LoraUse, Segment
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


PARTS = ((0, 40), (40, 24))
SITES = 5  # of a model; those of HELD are changed
HELD = (1, 3)


def changes(n: int, dtype, sites=HELD, inputs=64) -> dict[int, LoraSegments]:
    """What adapter n changes, by site: of the last one only the second part."""
    return {
        site: LoraSegments(
            Segment(0, 0, *adapter(n + site, inputs, columns, dtype), column) for column, columns in PARTS[site == sites[-1] :]
        )
        for site in sites
    }


def expected_of(y, x, updates, runs, sites, tokens, offsets) -> torch.Tensor:
    """y with the updates that each row is due, row by row, by the reference."""
    found = y.clone()
    for group, site in enumerate(sites):
        for row in range(offsets[group], offsets[group + 1]):
            for start, stop, n in runs:
                if start <= tokens[row] < stop and site in updates[n]:
                    mine = (Segment(row, row + 1, s.a, s.bt, s.column) for s in updates[n][site].segments)
                    reference(found, x, LoraSegments(mine))
    return found


BATCHES = (((0, 8, 0),), ((0, 1, 0), (1, 2, 1), (2, 3, 2), (4, 7, 3)), ((5, 8, 4),), ((0, 3, 4), (3, 8, 5)))


def test_a_table_filled_in_place_serves_every_linear_of_batch_after_batch(device, dtype, close):
    updates = [changes(n, dtype) for n in range(6)]
    pointers = [LoraPointers(update, SITES) for update in updates]
    sizes = torch.tensor([used.sizes.tolist() for used in pointers]).amax(0).numpy()
    place = pointers[0].held.device
    table = LoraTable.of_room(8, 64, sizes, dtype, aligned=False, place=place)
    where, x, y = table.held.data_ptr(), torch.randn(8, 64).to(dtype), torch.randn(8, 70).to(dtype)
    for site in range(SITES):  # before anything was filled in, nothing is changed
        unchanged = y.clone()
        ops.lora(unchanged, x, LoraUse(table, LoraSites((site,))))
        assert torch.equal(unchanged, y)
    for runs in BATCHES:
        used = [(start, stop, pointers[n]) for start, stop, n in runs]
        table.fill(used)
        for each in (table, LoraTable(used)):
            for site in range(SITES):
                found = y.clone()
                ops.lora(found, x, LoraUse(each, LoraSites((site,))))
                close(found, expected_of(y, x, updates, runs, [site], range(8), (0, 8)), factor=2)
    assert where == table.held.data_ptr()


@pytest.mark.parametrize(("counts", "runs"), (((3, 0, 9, 1), BATCHES[1]), ((0, 40, 0, 17), BATCHES[3]), ((5,), BATCHES[2])), ids=str)
def test_rows_made_of_a_step_s_rows_get_what_their_adapters_change_at_their_linears(device, dtype, counts, runs, close):
    updates = [changes(n, dtype, sites=(0, 1, 3, 4)) for n in range(6)]
    table = LoraTable([(start, stop, LoraPointers(updates[n], SITES)) for start, stop, n in runs])
    sites = (4, 2, 0, 3)[: len(counts)]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    generator = torch.Generator().manual_seed(sum(counts))
    tokens = torch.cat([torch.randint(0, 11, (count,), generator=generator).sort().values for count in counts])
    x, y = torch.randn(len(tokens), 64).to(dtype), torch.randn(len(tokens), 70).to(dtype)
    expected = expected_of(y, x, updates, runs, sites, tokens.tolist(), offsets.tolist())
    if len(counts) == 1:
        ops.lora(y, x, LoraUse(table, LoraSites(sites), tokens))
    else:
        ops.lora(y, x, LoraUse(table, LoraSites(sites, torch.tensor(sites)), tokens, offsets))
    close(y, expected, factor=2)


def test_adapters_take_turns_where_tiles_are_many(device, close, monkeypatch):
    from kvrun_kernels.sgmv import triton

    runs, dtype = [(n, n + 1, n % 6) for n in range(40)], torch.float32
    updates = [changes(n, dtype) for n in range(6)]
    table = LoraTable([(start, stop, LoraPointers(updates[n], SITES)) for start, stop, n in runs])
    x, y, tokens = torch.randn(40, 64).to(dtype), torch.randn(40, 70).to(dtype), torch.arange(40)
    found = []
    for programs in (1, 8, 1024):
        monkeypatch.setattr(triton, "PROGRAMS", programs)
        found.append(y.clone())
        ops.lora(found[-1], x, LoraUse(table, LoraSites((1,)), tokens))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    close(found[0], expected_of(y, x, updates, runs, [1], range(40), (0, 40)), factor=2)


def test_what_a_table_has_no_room_for_is_refused(device):
    of = [LoraPointers(changes(n, dtype), SITES) for n, dtype in ((0, torch.float32), (4, torch.float32), (0, torch.bfloat16))]
    place = of[0].held.device
    table = LoraTable.of_room(2, 40, of[0].sizes, torch.float32, aligned=False, place=place)
    with pytest.raises(ValueError, match=r"room for 2 tiles of 2 rows; found 3 of 3; make more"):
        table.fill([(n, n + 1, of[0]) for n in range(3)])
    with pytest.raises(ValueError, match=r"a table of torch\.float32 up to rank 40 was made; found one of torch\.float32 and rank 64"):
        table.fill([(0, 1, of[1])])
    with pytest.raises(ValueError, match=r"found one of torch\.bfloat16 and rank 16"):
        table.fill([(0, 1, of[2])])
    aligned = LoraTable.of_room(2, 64, of[0].sizes, torch.float32, aligned=True, place=place)
    odd = LoraPointers(changes(0, torch.float32, inputs=63), SITES)
    with pytest.raises(ValueError, match=r"for aligned adapters; found one of .* that is not; make another table"):
        aligned.fill([(0, 1, odd)])
    use = LoraUse(LoraTable([(0, 1, of[0])]), LoraSites((1,)))
    with pytest.raises(ValueError, match=r"a table of 1 rows reads 64 inputs here and reaches column 64; found y \[1, 40\]"):
        ops.lora(torch.zeros(1, 40), torch.zeros(1, 64), use)
    with pytest.raises(ValueError, match="which only Triton on a GPU does"):
        ops.lora(torch.zeros(1, 70).double(), torch.zeros(1, 64).double(), use)
