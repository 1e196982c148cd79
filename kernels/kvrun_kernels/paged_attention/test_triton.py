"""Triton's attention over pages against the reference: every kind of score, grouping, page size and pool; one row, prompts and both."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.paged_attention.op import reference
from kvrun_kernels.store_kv.op import reference as store
from kvrun_kernels.stored import FORMATS, stored_width


class Batch:
    """Sequences with shuffled pages in a pool whose unowned memory is not a number, so that reading it shows."""

    def __init__(self, tokens, contexts, q_heads=4, kv_heads=2, dim=16, page_tokens=16, dtype=torch.float32, planes=2, format=None):
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        self.query_start = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        needed = [-(-c // page_tokens) for c in contexts]
        order = torch.randperm(sum(needed) + 3).to(torch.int32)
        format = format or dtype
        self.pool = torch.empty(sum(needed) + 3, planes, kv_heads, page_tokens, stored_width(dim, format), dtype=format)
        self.pool.view(torch.uint8).fill_(0xFF)
        self.page_table = torch.full((len(contexts), max(needed)), -1, dtype=torch.int32)
        for n, (context, pages) in enumerate(zip(contexts, needed)):
            mine = order[sum(needed[:n]) : sum(needed[:n]) + pages]
            self.page_table[n, :pages] = mine
            at = torch.arange(context)
            slots = (mine.long()[at // page_tokens] * page_tokens + at % page_tokens).int()
            k, v = torch.randn(2, context, kv_heads, dim).to(dtype)
            store(k, v if planes == 2 else None, self.pool, slots)
        self.q = torch.randn(int(self.query_start[-1]), q_heads, dim).to(dtype)

    def run(self, op=ops.paged_attention, **options):
        scale = self.q.shape[2] ** -0.5
        return op(self.q, self.pool, self.query_start, self.contexts, self.page_table, scale, **options)

    def check(self, close, **options):
        found = self.run(**options)
        close(found, self.run(reference, **options))
        return found


@pytest.mark.parametrize("q_heads,kv_heads,dim", ((1, 1, 8), (6, 2, 20)))
def test_heads_and_dimensions(device, dtype, q_heads, kv_heads, dim, close):
    Batch((1, 21, 1), (70, 40, 1), q_heads, kv_heads, dim, dtype=dtype).check(close)


def test_more_heads_than_a_tile_has_rows(device, close):
    Batch((1, 2), (9, 20), q_heads=71, kv_heads=1).check(close)


@pytest.mark.parametrize("page_tokens", (1, 7, 64))
def test_page_sizes_and_rows_alone(device, page_tokens, close):
    Batch((1, 0, 1, 1), (33, 5, 7, 64), page_tokens=page_tokens).check(close)


@pytest.mark.parametrize(
    "options",
    (
        {"window": 1},
        {"window": 50},
        {"softcap": 2.0},
        {"slopes": [0.5, 0.25, 0.125, 0.01]},
        {"sinks": [-100.0, 0.5, 3.0, 100.0]},
        {"window": 30, "softcap": 5.0, "slopes": [0.0, 0.1, 0.2, 0.3], "sinks": [0.1, 1.0, 2.0, 3.0]},
        {"relative": 3},
        {"relative": 100, "window": 40},
    ),
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("tokens,contexts", (((21, 1), (37, 80)), ((1,), (1050,))), ids=("prompts", "rows"))
def test_kinds_of_scores(device, options, tokens, contexts, close):
    made = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in options.items()}
    if "relative" in made:
        made["relative"] = torch.randn(4, 2 * made["relative"] + 1)
    Batch(tokens, contexts).check(close, **made)


@pytest.mark.parametrize("sinks", (None, 0.5))
def test_rows_reach_beyond_and_short_of_themselves(device, sinks, close):
    batch = Batch((40, 1, 3), (70, 90, 3))
    reach = torch.cat([torch.arange(c - t, c) for t, c in ((40, 70), (1, 90), (3, 3))])
    reach[5:20], reach[30:40], reach[41:43] = 60, 5000, -1
    options = {} if sinks is None else {"sinks": torch.full((4,), sinks)}
    found = batch.check(close, reach=reach.to(torch.int32), window=25, **options)
    assert not found[41:43].any()


@pytest.mark.parametrize("dtype_of_q", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_pools_of_every_format(device, format, dtype_of_q, close):
    Batch((5, 1), (20, 40), dim=20, dtype=dtype_of_q, format=format).check(close)
    Batch((1,), (1040,), dim=19, dtype=dtype_of_q, format=format).check(close, value_dim=7)


@pytest.mark.parametrize("q_heads,dim,value_dim", ((5, 48, 32), (16, 72, 64)))
def test_latents_are_keys_and_values(device, q_heads, dim, value_dim, close):
    Batch((1, 9, 1), (60, 30, 1), q_heads, 1, dim, planes=1).check(close, value_dim=value_dim)


def test_views_of_queries_and_pages_that_slid_out_of_the_window(device, close):
    batch = Batch((4, 1), (40, 100), dim=24)
    fused = torch.randn(5, 4 * 24 + 50)
    batch.q = fused[:, : 4 * 24].unflatten(1, (4, 24))
    expected = batch.run(reference, window=20)
    batch.pool[batch.page_table[1, :5].long()] = float("nan")
    close(batch.run(window=20), expected)
