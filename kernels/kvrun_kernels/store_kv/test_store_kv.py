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
