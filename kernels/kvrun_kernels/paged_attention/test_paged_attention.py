"""Attention over pages: right against the plain softmax, and the same to the bit however the work is cut."""

from itertools import pairwise

import pytest
import torch

import kvrun_kernels
from kvrun_kernels import ops
from kvrun_kernels.paged_attention.op import reference
from kvrun_kernels.store_kv.op import reference as store
from kvrun_kernels.stored import stored_width


class Batch:
    """Sequences with shuffled pages in a pool whose unowned memory is NaN, so that reading it shows."""

    def __init__(self, tokens, contexts, q_heads=4, kv_heads=2, dim=16, page_tokens=16, dtype=torch.float32, planes=2, format=None):
        self.page_tokens, self.dtype, format = page_tokens, dtype, format or dtype
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        self.query_start = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        needed = [-(-c // page_tokens) for c in contexts]
        order = torch.randperm(sum(needed) + 3).to(torch.int32)
        self.pool = torch.empty(sum(needed) + 3, planes, kv_heads, page_tokens, stored_width(dim, format), dtype=format)
        self.pool.view(torch.uint8).fill_(0xFF)
        self.page_table = torch.full((len(contexts), max(needed)), -1, dtype=torch.int32)
        for n, (context, pages) in enumerate(zip(contexts, needed)):
            mine = order[sum(needed[:n]) : sum(needed[:n]) + pages]
            self.page_table[n, :pages] = mine
            at = torch.arange(context)
            slots = mine.long()[at // page_tokens] * page_tokens + at % page_tokens
            k, v = torch.randn(2, context, kv_heads, dim).to(dtype)
            store(k, v if planes == 2 else None, self.pool, slots)
        self.q = torch.randn(int(self.query_start[-1]), q_heads, dim).to(dtype)
        self.scale = dim**-0.5

    def run(self, op=ops.paged_attention, **options):
        return op(self.q, self.pool, self.query_start, self.contexts, self.page_table, self.scale, **options)

    def expected(self, **options):
        return reference(self.q, self.pool, self.query_start, self.contexts, self.page_table, self.scale, **options)


@pytest.mark.parametrize("dim", (8, 20, 64, 80, 96, 112, 128, 192, 256, 576))
def test_every_head_dimension(level, dim, close):
    batch = Batch((5, 1, 1), (5, 70, 33), q_heads=4, kv_heads=2, dim=dim)
    close(batch.run(), batch.expected())


@pytest.mark.parametrize("q_heads,kv_heads", ((1, 1), (4, 4), (6, 2), (6, 1), (5, 1), (7, 1), (8, 1), (71, 1), (130, 1), (32, 4)))
def test_every_grouping_of_heads(level, dtype, q_heads, kv_heads, close):
    batch = Batch((1, 37, 1), (600, 90, 1), q_heads, kv_heads, dim=32, dtype=dtype)
    close(batch.run(), batch.expected())


@pytest.mark.parametrize("page_tokens", (1, 7, 16, 64))
def test_every_page_size(level, page_tokens, close):
    batch = Batch((9, 1), (140, 77), q_heads=2, kv_heads=1, dim=16, page_tokens=page_tokens)
    close(batch.run(), batch.expected())


@pytest.mark.parametrize(
    "options",
    (
        {"window": 1},
        {"window": 50},
        {"window": 1000},
        {"softcap": 2.0},
        {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.01])},
        {"window": 70, "softcap": 5.0, "slopes": torch.tensor([0.0, 0.1, 0.2, 0.3])},
    ),
    ids=lambda options: " ".join(options),
)
def test_windows_caps_and_slopes(level, options, close):
    batch = Batch((130, 1, 3), (130, 900, 600), q_heads=4, kv_heads=2, dim=32)
    close(batch.run(**options), batch.expected(**options))


def test_query_views_into_a_fused_projection_are_read_in_place(level, close):
    batch = Batch((4, 1), (40, 20), q_heads=4, kv_heads=2, dim=24)
    fused = torch.randn(5, 4 * 24 + 50)
    batch.q = fused[:, : 4 * 24].unflatten(1, (4, 24))
    close(batch.run(), batch.expected())


def test_an_empty_sequence_beside_others(level, close):
    batch = Batch((2, 0, 1), (2, 5, 9), q_heads=2, kv_heads=1, dim=16)
    close(batch.run(), batch.expected())


@pytest.mark.parametrize("context", (1, 2, 70, 1100))
def test_a_key_that_is_no_number_makes_an_answer_that_is_none(level, dtype, context):
    batch = Batch((1, 1), (context, context), dtype=dtype)
    of_the_first = batch.page_table[0, (context - 1) // 16]
    batch.pool[of_the_first, 0, :, (context - 1) % 16] = torch.nan
    first, second = batch.run()
    assert first.isnan().all() and second.isfinite().all()


@pytest.mark.parametrize("options", ({}, {"window": 100, "softcap": 3.0}), ids=("plain", "window"))
@pytest.mark.parametrize("q_heads,kv_heads", ((4, 4), (8, 2)))
def test_chunks_of_any_size_give_the_same_bits(level, dtype, q_heads, kv_heads, options):
    length = 700
    whole = Batch((length,), (length,), q_heads, kv_heads, dim=48, dtype=dtype)
    expected = whole.run(**options)
    for chunk in (1, 7, 64, 333):
        for start in range(0, length, chunk) if chunk > 1 else (0, 1, 63, 64, 511, 512, 513, 699):
            stop = min(start + chunk, length)
            found = ops.paged_attention(
                whole.q[start:stop], whole.pool, torch.tensor([0, stop - start], dtype=torch.int32),
                torch.tensor([stop], dtype=torch.int32), whole.page_table, whole.scale, **options,
            )  # fmt: skip
            assert torch.equal(found, expected[start:stop]), (chunk, start)


def test_neighbours_and_threads_never_change_a_row(level, dtype):
    batch = Batch((1,) * 9 + (40,), (1, 5, 64, 65, 512, 513, 1030, 200, 700, 640), q_heads=4, kv_heads=2, dim=64, dtype=dtype)
    together = batch.run()
    threads = kvrun_kernels.get_num_threads()
    try:
        for count in (1, 3):
            kvrun_kernels.set_num_threads(count)
            assert torch.equal(batch.run(), together)
            for n in range(10):
                rows = slice(int(batch.query_start[n]), int(batch.query_start[n + 1]))
                alone = ops.paged_attention(
                    batch.q[rows], batch.pool, torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
                    batch.contexts[n : n + 1], batch.page_table[n : n + 1], batch.scale,
                )  # fmt: skip
                assert torch.equal(alone, together[rows]), n
    finally:
        kvrun_kernels.set_num_threads(threads)


def test_pages_that_slid_out_of_the_window_are_never_read(level, close):
    batch = Batch((1,), (300,), q_heads=2, kv_heads=1, dim=32)
    expected = batch.expected(window=40)
    batch.pool[batch.page_table[0, :16].long()] = float("nan")
    close(batch.run(window=40), expected)


@pytest.mark.parametrize("options", ({}, {"window": 60, "softcap": 4.0}), ids=("plain", "window"))
def test_sinks_take_their_share(level, dtype, options, close):
    batch = Batch((130, 1, 3), (130, 900, 600), q_heads=4, kv_heads=2, dim=32, dtype=dtype)
    sinks = torch.tensor([-100.0, 0.5, 3.0, 100.0])
    found, without = batch.run(sinks=sinks, **options), batch.run(**options)
    close(found, batch.expected(sinks=sinks, **options))
    close(found[:, 0], without[:, 0])
    assert found[:, 2].float().norm() < 0.9 * without[:, 2].float().norm() and not found[:, 3].any()


@pytest.mark.parametrize("window", (0, 90))
def test_rows_reach_beyond_and_short_of_themselves(level, dtype, window, close):
    batch = Batch((130, 1, 3, 40), (700, 90, 3, 1100), q_heads=4, kv_heads=2, dim=32, dtype=dtype)
    at = torch.cat([torch.arange(c - t, c) for t, c in ((130, 700), (1, 90), (3, 3), (40, 1100))])
    # An image's span, one that ends past the context, rows that see a part, and rows that see nothing.
    reach = at.clone()
    reach[20:90], reach[120:], reach[131:133], reach[140:150] = 659, 5000, -1, 7
    reach = reach.to(torch.int32)
    close(batch.run(reach=reach, window=window), batch.expected(reach=reach, window=window))
    assert not batch.run(reach=reach)[131:133].any()
    assert torch.equal(batch.run(reach=at.to(torch.int32), window=window), batch.run(window=window))


def test_queries_attend_over_a_memory_of_another_length(level, dtype, close):
    batch = Batch((9, 3, 2, 1), (4, 70, 0, 513), q_heads=4, kv_heads=4, dim=24, dtype=dtype)
    reach = (batch.contexts - 1).repeat_interleave(torch.tensor([9, 3, 2, 1]))
    found = batch.run(reach=reach)
    close(found, batch.expected(reach=reach))
    for row, n in ((0, 0), (8, 0), (10, 1), (14, 3)):
        alone = ops.paged_attention(
            batch.q[row : row + 1], batch.pool, torch.tensor([0, 1], dtype=torch.int32), batch.contexts[n : n + 1],
            batch.page_table[n : n + 1], batch.scale,
        )  # fmt: skip
        assert torch.equal(alone, found[row : row + 1])


@pytest.mark.parametrize("most", (0, 3, 40, 2000))
@pytest.mark.parametrize("encoder", (False, True), ids=("decoder", "encoder"))
def test_a_learned_bias_by_distance(level, most, encoder, close):
    batch = Batch((130, 1, 3), (130, 900, 600), q_heads=4, kv_heads=2, dim=32)
    relative = torch.randn(4, 2 * most + 1)
    reach = torch.full((134,), 10**6, dtype=torch.int32) if encoder else None
    close(batch.run(relative=relative, reach=reach), batch.expected(relative=relative, reach=reach))


@pytest.mark.parametrize("q_heads,dim,value_dim", ((1, 20, 7), (5, 48, 32), (16, 576, 512), (128, 72, 64)))
@pytest.mark.parametrize("pool_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_latents_are_keys_and_values(level, pool_dtype, q_heads, dim, value_dim, close):
    batch = Batch((1, 17, 1), (600, 90, 1), q_heads, kv_heads=1, dim=dim, dtype=pool_dtype, planes=1)
    found = batch.run(value_dim=value_dim)
    assert found.shape == (19, q_heads, value_dim)
    close(found, batch.expected(value_dim=value_dim))


def test_values_may_be_narrower_than_keys(level, close):
    batch = Batch((1, 17, 1), (600, 90, 1), q_heads=4, kv_heads=2, dim=192)
    found = batch.run(value_dim=128)
    close(found, batch.expected(value_dim=128))
    assert torch.equal(found, batch.run()[..., :128])


@pytest.mark.parametrize(
    "planes,options",
    ((2, {"sinks": torch.tensor([0.1, 2.0] * 4)}), (2, {"relative": torch.randn(8, 81), "window": 300}), (1, {"value_dim": 36})),
    ids=("sinks", "relative", "latents"),
)
def test_every_kind_is_the_same_to_the_bit_in_chunks_and_by_threads(level, planes, options):
    whole = Batch((700,), (700,), 8, 1, dim=48, dtype=torch.bfloat16, planes=planes)
    reach = torch.arange(700, dtype=torch.int32)
    reach[530:600] = 599
    expected = whole.run(reach=reach, **options)
    threads = kvrun_kernels.get_num_threads()
    try:
        for count, cuts in ((1, (0, 1, 2, 530, 600, 700)), (3, (0, 64, 512, 513, 699, 700)), (2, (0, 100, 500, 600, 700))):
            kvrun_kernels.set_num_threads(count)
            assert torch.equal(whole.run(reach=reach, **options), expected)
            for start, stop in pairwise(cuts):
                found = ops.paged_attention(
                    whole.q[start:stop], whole.pool, torch.tensor([0, stop - start], dtype=torch.int32),
                    torch.tensor([stop], dtype=torch.int32), whole.page_table, whole.scale, reach=reach[start:stop], **options,
                )  # fmt: skip
                assert torch.equal(found, expected[start:stop]), (start, stop)
    finally:
        kvrun_kernels.set_num_threads(threads)


def test_heads_that_do_not_divide_are_refused():
    batch = Batch((1,), (4,), q_heads=3, kv_heads=2, dim=8)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        batch.run()
