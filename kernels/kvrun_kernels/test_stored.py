"""Pages of 8-bit numbers: what is kept of a vector, by every level alike, and attention over it."""

from itertools import pairwise

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.paged_attention.op import reference as attend
from kvrun_kernels.store_kv.op import reference as store
from kvrun_kernels.stored import narrow, stored_width, widen

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
FORMATS = (*FLOATS, torch.int8)


@pytest.fixture(params=FORMATS, ids=lambda format: str(format).removeprefix("torch."))
def format(request):
    return request.param


def empty(pages, kv_heads, dim, format, planes=2):
    return torch.zeros(pages, planes, kv_heads, 16, stored_width(dim, format), dtype=format)


def as_bytes(pool):
    return pool.view(torch.uint8)


def filled(k, v, format):
    pool = empty(-(-len(k) // 16), k.shape[1], k.shape[2], format, 1 if v is None else 2)
    ops.store_kv(k, v, pool, torch.arange(len(k), dtype=torch.int32))
    return pool


def attention(op, q, pool, contexts, **options):
    contexts = torch.tensor(contexts, dtype=torch.int32)
    starts = torch.arange(len(contexts) + 1, dtype=torch.int32) * (len(q) // len(contexts))
    table = torch.arange(len(pool), dtype=torch.int32).expand(len(contexts), -1)
    return op(q, pool, starts, contexts, table, q.shape[-1] ** -0.5, **options)


@pytest.mark.parametrize("dim,value_dim", ((8, 8), (80, 80), (64, 40), (19, 7), (128, 128)))
def test_every_level_stores_the_same_bits(level, dtype, format, dim, value_dim):
    k = (torch.randn(40, 3, dim) * torch.exp(3 * torch.randn(40, 3, 1))).to(dtype)
    v = torch.randn(40, 3, value_dim).to(dtype)
    pool = empty(5, 3, dim, format)
    as_bytes(pool).random_(256)
    expected, slots = pool.clone(), torch.randperm(80)[:40].to(torch.int32)
    ops.store_kv(k, v, pool, slots)
    store(k, v, expected, slots)
    assert torch.equal(as_bytes(pool), as_bytes(expected))


def test_the_edges_of_the_formats_are_stored_alike(level, format):
    edges = [448, 449, 464, 465, 479, 480, 500, 1e6, 57344, 61439, 61440, 65536, 3e38, 1.0625, 1.1875, 0.0, 1e-45, 1e-40]
    edges += [2.0**-n for n in range(5, 19)] + [2.0**-n * 1.001 for n in range(5, 19)] + [2.0**-n * 1.5 for n in range(5, 19)]
    k = torch.tensor([*edges, *(-edge for edge in edges)]).view(-1, 1, 1).repeat(1, 1, 5)
    # Beside others too, so that rows of integers have a scale of another number's making.
    k = torch.cat((k, k[torch.randperm(len(k))].view(5, 1, -1)[..., :5], torch.zeros(1, 1, 5)))
    pool, expected = filled(k, None, format), empty(-(-len(k) // 16), 1, 5, format, planes=1)
    store(k, None, expected, torch.arange(len(k), dtype=torch.int32))
    assert torch.equal(as_bytes(pool), as_bytes(expected))


def test_what_comes_back_is_near(format):
    x = torch.randn(1000, 64) * torch.exp(torch.randn(1000, 1))
    back = widen(narrow(x, format))
    if format == torch.int8:
        # Half a step of the row's scale.
        assert ((back - x).abs() <= x.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()
        return
    about = torch.finfo(format)
    assert ((back - x).abs() <= torch.maximum(x.abs() * about.eps / 2, torch.tensor(about.smallest_normal * about.eps / 2))).all()


def test_too_large_is_the_largest_and_no_number_is_nan(level, format):
    x = torch.ones(4, 1, 24)
    x[0, 0, 3], x[1, 0, 5], x[2, 0, 7], x[3, 0, 0] = 1e9, float("inf"), float("nan"), -1e9
    rows = widen(filled(x, None, format)[0, 0, 0, :4])
    most = 1e9 if format == torch.int8 else torch.finfo(format).max
    torch.testing.assert_close(rows[[0, 3], [3, 0]], torch.tensor([most, -most]))
    assert rows[[0, 3]].isfinite().all() and rows[1, 5].isnan() and rows[2, 7].isnan()
    assert rows[1:3].isnan().sum() == (48 if format == torch.int8 else 2)
    # And attention says so, rather than answer without the key.
    v = torch.ones(4, 1, 24)
    for keys in (x[1:2], x[1:3], v[:1]):
        found = attention(ops.paged_attention, v[:1], filled(keys, v[: len(keys)], format), [len(keys)])
        assert found.isnan().all() == (not keys.isfinite().all())


@pytest.mark.parametrize("format", FLOATS, ids=str)
def test_every_code_is_read(level, format):
    codes = torch.arange(256, dtype=torch.uint8).view(format)
    for code, value in zip(codes, codes.float()):
        pool = empty(1, 1, 20, format)
        pool[:, 1, 0, 0] = code
        found = attention(ops.paged_attention, torch.zeros(1, 1, 20), pool, [1])
        assert torch.equal(found, value.expand(1, 1, 20)) or (value.isnan() and found.isnan().all())


@pytest.mark.parametrize("dim", (20, 64, 128))
def test_attention_over_pages(level, dtype, format, dim, close):
    k, v, q = torch.randn(600, 2, dim).to(dtype), torch.randn(600, 2, dim).to(dtype), torch.randn(6, 4, dim).to(dtype)
    pool = filled(k, v, format)
    for options in ({}, {"window": 70, "softcap": 5.0}, {"value_dim": dim - 7}):
        found = attention(ops.paged_attention, q, pool, [600, 77], **options)
        close(found, attention(attend, q, pool, [600, 77], **options))
    exact = attention(attend, q, filled(k, v, torch.float32), [600, 77])
    found = attention(ops.paged_attention, q, pool, [600, 77])
    # Errors of single numbers average out over the keys.
    assert (found - exact).float().norm() / exact.float().norm() < {torch.float8_e4m3fn: 0.06, torch.float8_e5m2: 0.12, torch.int8: 0.02}[
        format
    ]


@pytest.mark.parametrize("dim,value_dim", ((72, 64), (576, 512), (20, 7)))
def test_latents_are_keys_and_values(level, format, dim, value_dim, close):
    pool, q = filled(torch.randn(90, 1, dim), None, format), torch.randn(4, 16, dim)
    found = attention(ops.paged_attention, q, pool, [90, 33], value_dim=value_dim)
    close(found, attention(attend, q, pool, [90, 33], value_dim=value_dim))


def test_neighbours_and_chunks_change_no_bit(level, format):
    k, v = torch.randn(2, 700, 2, 48)
    q, whole = torch.randn(700, 4, 48), filled(k, v, format)
    expected, pool = attention(ops.paged_attention, q, whole, [700]), empty(44, 2, 48, format)
    for start, stop in pairwise((0, 1, 64, 333, 512, 699, 700)):
        ops.store_kv(k[start:stop], v[start:stop], pool, torch.arange(start, stop, dtype=torch.int32))
        assert torch.equal(attention(ops.paged_attention, q[start:stop], pool, [stop]), expected[start:stop])
    assert torch.equal(as_bytes(pool)[:43], as_bytes(whole)[:43])


def test_a_pool_of_another_width_is_refused():
    k = torch.zeros(1, 1, 8)
    pool, slots = torch.zeros(1, 2, 1, 16, 8, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"vectors of 8 take 12 elements of torch.int8; the pool has 8"):
        ops.store_kv(k, k, pool, slots)
    with pytest.raises(ValueError, match=r"queries of 8 numbers .* 8 elements of torch.int8"):
        attention(ops.paged_attention, k, pool, [1])
