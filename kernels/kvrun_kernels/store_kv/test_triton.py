"""Triton stores the bits that the reference stores, in pools of every format, and nothing beside them."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.store_kv.op import reference
from kvrun_kernels.stored import FORMATS, as_held, stored_width

EDGES = [448, 464, 465, 480, 1e6, 57344, 61440, 65536, 3e38, 1.0625, 1.1875, 0.0, 1e-45, float("inf"), float("nan")]
EDGES += [2.0**-n * more for n in range(5, 19) for more in (1, 1.001, 1.5)]


def check(k, v, format, page_tokens=16):
    pool = torch.empty(80 // page_tokens, 1 if v is None else 2, k.shape[1], page_tokens, stored_width(k.shape[2], format), dtype=format)
    pool.view(torch.uint8).random_(60)
    expected, slots = pool.clone(), torch.randperm(80)[: len(k)].to(torch.int32)
    ops.store_kv(k, v, pool, slots)
    reference(k, v, expected, slots)
    assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8)) and as_held(pool).data_ptr() == pool.data_ptr()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dim,value_dim,page_tokens", ((8, 8, 16), (19, 7, 1), (64, None, 16)))
def test_the_same_bits_from_views(device, dtype, format, dim, value_dim, page_tokens):
    fused = (torch.randn(7, 3 * dim + 3 * (value_dim or 0) + 5) * torch.exp(3 * torch.randn(7, 1))).to(dtype)
    v = None if value_dim is None else fused[:, 3 * dim : 3 * (dim + value_dim)].unflatten(1, (3, value_dim))
    check(fused[:, : 3 * dim].unflatten(1, (3, dim)), v, format, page_tokens)


@pytest.mark.parametrize("format", (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8), ids=str)
def test_the_edges_of_the_formats(device, format):
    edges = torch.tensor([*EDGES, *(-edge for edge in EDGES)])
    check(edges.view(-1, 6, 1).repeat(1, 1, 5), None, format)
    check(edges[torch.randperm(len(edges))].view(6, 1, -1).contiguous(), None, format)
    check(torch.zeros(2, 1, 5), None, format)
