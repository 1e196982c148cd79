"""Triton's attention over pages against the reference: every kind of score, grouping, page size and pool; one row, prompts and both."""

import pytest
import torch

from kvrun_kernels.paged_attention.test_paged_attention import Batch
from kvrun_kernels.stored import FORMATS


def check(close, batch: Batch, **options) -> torch.Tensor:
    found = batch.run(**options)
    close(found, batch.expected(**options))
    return found


@pytest.mark.parametrize("q_heads,kv_heads,dim", ((1, 1, 8), (6, 2, 20)))
def test_heads_and_dimensions(device, dtype, q_heads, kv_heads, dim, close):
    check(close, Batch((1, 21, 1), (70, 40, 1), q_heads, kv_heads, dim, dtype=dtype))


def test_more_heads_than_a_tile_has_rows(device, close):
    check(close, Batch((1, 2), (9, 20), q_heads=71, kv_heads=1))


@pytest.mark.parametrize("page_tokens", (1, 7, 64))
def test_page_sizes_and_rows_alone(device, page_tokens, close):
    check(close, Batch((1, 0, 1, 1), (33, 5, 7, 64), page_tokens=page_tokens))


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
    check(close, Batch(tokens, contexts), **made)


@pytest.mark.parametrize("sinks", (None, 0.5))
def test_rows_reach_beyond_and_short_of_themselves(device, sinks, close):
    batch = Batch((40, 1, 3), (70, 90, 3))
    reach = torch.cat([torch.arange(c - t, c) for t, c in ((40, 70), (1, 90), (3, 3))])
    reach[5:20], reach[30:40], reach[41:43] = 60, 5000, -1
    options = {} if sinks is None else {"sinks": torch.full((4,), sinks)}
    found = check(close, batch, reach=reach.to(torch.int32), window=25, **options)
    assert not found[41:43].any()


@pytest.mark.parametrize("dtype_of_q", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_pools_of_every_format(device, format, dtype_of_q, close):
    check(close, Batch((5, 1), (20, 40), dim=20, dtype=dtype_of_q, format=format))
    check(close, Batch((1,), (1040,), 2, 1, dim=19, dtype=dtype_of_q, format=format), value_dim=7)


@pytest.mark.parametrize("q_heads,dim,value_dim", ((5, 48, 32), (16, 72, 64)))
def test_latents_are_keys_and_values(device, q_heads, dim, value_dim, close):
    check(close, Batch((1, 9, 1), (60, 30, 1), q_heads, 1, dim, planes=1), value_dim=value_dim)


def test_views_of_queries_and_pages_that_slid_out_of_the_window(device, close):
    batch = Batch((4, 1), (40, 100), dim=24)
    fused = torch.randn(5, 4 * 24 + 50)
    batch.q = fused[:, : 4 * 24].unflatten(1, (4, 24))
    expected = batch.expected(window=20)
    batch.pool[batch.page_table[1, :5].long()] = float("nan")
    close(batch.run(window=20), expected)
