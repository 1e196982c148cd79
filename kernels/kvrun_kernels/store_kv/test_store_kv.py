"""Every token lands in its slot and nothing else changes."""

import pytest
import torch

from kvrun_kernels import ops
from kvrun_kernels.store_kv.op import reference


@pytest.mark.parametrize("dim,value_dim", ((8, 8), (80, 80), (64, 40), (19, 7)))
@pytest.mark.parametrize("page_tokens", (1, 16))
@pytest.mark.parametrize("pool_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_tokens_land_in_their_slots(level, dtype, pool_dtype, dim, value_dim, page_tokens):
    pool = torch.randn(9 * 16 // page_tokens, 2, 3, page_tokens, dim).to(pool_dtype)
    expected = pool.clone()
    fused = torch.randn(11, 3 * dim + 3 * value_dim + 5).to(dtype)
    k = fused[:, : 3 * dim].unflatten(1, (3, dim))
    v = fused[:, 3 * dim : 3 * (dim + value_dim)].unflatten(1, (3, value_dim))
    slots = torch.randperm(9 * 16)[:11].to(torch.int32)
    ops.store_kv(k, v, pool, slots)
    reference(k, v, expected, slots)
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("pool_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_pool_of_one_plane_takes_keys_alone(level, dtype, pool_dtype):
    pool = torch.randn(9, 1, 2, 16, 20).to(pool_dtype)
    expected, k = pool.clone(), torch.randn(11, 2, 25).to(dtype)[..., :20]
    slots = torch.randperm(9 * 16)[:11].to(torch.int32)
    ops.store_kv(k, None, pool, slots)
    reference(k, None, expected, slots)
    assert torch.equal(pool, expected)


def test_a_pool_of_other_planes_is_refused():
    with pytest.raises(ValueError, match="keys and values asked for a pool of 1 planes"):
        ops.store_kv(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1, 1, 4, 4), torch.zeros(1, dtype=torch.int32))
