"""The collectives of a group, its ranks being threads of this process that talk over real sockets."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kvrun.dist import Group
from kvrun.errors import DeviceError


def together(world, rendezvous, work):
    """What `work(group)` returns on every rank of a fresh group."""
    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(lambda rank: work(Group.join(rendezvous, rank, world, timeout_s=30)), range(world)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [2, 3])
def test_a_sum_over_ranks_is_the_same_on_all_of_them_and_to_the_bit_for_a_row_alone(world, dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(world, 7, 33, generator=generator).to(dtype)

    def work(group):
        whole = group.all_reduce(parts[group.rank].clone())
        rows = [group.all_reduce(parts[group.rank, i : i + 1].clone()) for i in range(7)]
        return whole, torch.cat(rows)

    answers = together(world, tmp_path / "file", work)
    for whole, alone in answers:
        assert torch.equal(whole, answers[0][0])
        assert torch.equal(alone, whole)
    torch.testing.assert_close(answers[0][0].double(), parts.double().sum(0), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("sizes", [(3, 3), (4, 3, 3), (1, 5), (2, 0)])
def test_columns_of_uneven_widths_are_laid_side_by_side_on_rank_0(sizes, tmp_path):
    columns = torch.arange(2 * sum(sizes), dtype=torch.float32).view(2, -1)
    first, *others = together(len(sizes), tmp_path / "file", lambda group: group.gather_columns(columns.split(sizes, 1)[group.rank], sizes))
    assert torch.equal(first, columns) and others == [None] * len(others)


def test_a_broadcast_gives_every_rank_what_rank_0_has(tmp_path):
    answers = together(3, tmp_path / "file", lambda group: group.broadcast(torch.tensor([group.rank + 5])).tolist())
    assert answers == [[5], [5], [5]]


def test_a_group_of_one_needs_nobody():
    group, x = Group.single(), torch.ones(2, 3)
    assert group.all_reduce(x) is x and group.broadcast(x) is x and group.gather_columns(x, (3,)) is x
    group.barrier()


def test_a_rank_that_stays_away_is_reported(tmp_path):
    with pytest.raises(DeviceError, match=r"rank 0 of 2 met fewer than 2 ranks at .* within 0\.5 s") as error:
        Group.join(tmp_path / "file", 0, 2, timeout_s=0.5)
    assert error.value.exit_code == 14


def test_a_rank_that_has_gone_ends_the_next_collective_at_once(tmp_path):
    def work(group):
        group.barrier()
        if group.rank:
            return None  # its group is dropped, and its sockets with it
        with pytest.raises(RuntimeError):
            for _ in range(100):
                group.barrier()
        return "noticed"

    assert together(2, tmp_path / "file", work)[0] == "noticed"
