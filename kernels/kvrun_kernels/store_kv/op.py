"""Writing keys and values into the pages of the pool."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu
from kvrun_kernels.stored import FORMATS, holds, narrow, stored_width

SCHEMA = "store_kv(Tensor k, Tensor? v, Tensor(a!) pool, Tensor slots) -> ()"

_kernel = Kernel("store_kv", "pppp iii iiii iii ii")


def reference(k: Tensor, v: Tensor | None, pool: Tensor, slots: Tensor) -> None:
    page_tokens = pool.shape[3]
    page, offset = slots.long() // page_tokens, slots.long() % page_tokens
    pool[page, 0, :, offset] = narrow(k, pool.dtype)
    if v is not None:
        pool[page, 1, :, offset] = narrow(torch.nn.functional.pad(v, (0, k.shape[-1] - v.shape[-1])), pool.dtype)


def store_kv(k: Tensor, v: Tensor | None, pool: Tensor, slots: Tensor) -> None:
    """Write each token's keys and values to its slot; slot = page * page_tokens + place in the page.

    k [tokens, kv_heads, dim] · v [tokens, kv_heads, at most dim], the rest of its place is zeroed ·
    pool [pages, 2, kv_heads, page_tokens, dim], keys at 0 and values at 1; [pages, 1, ...] where v is None, for keys that
    hold their values (MLA's latents) · slots [tokens] int32. What a pool of 8-bit numbers keeps of a vector, and how long its
    last dimension is, `stored.py` says.
    """
    if pool.shape[1] != (1 if v is None else 2):
        raise ValueError(
            f"{'keys' if v is None else 'keys and values'} asked for a pool of {pool.shape[1]} planes; its shape is {list(pool.shape)}"
        )
    if pool.shape[4] != stored_width(k.shape[2], pool.dtype):
        raise ValueError(
            f"vectors of {k.shape[2]} take {stored_width(k.shape[2], pool.dtype)} elements of {pool.dtype}; the pool has {pool.shape[4]}"
        )
    if pool.is_contiguous() and pool.dtype in FORMATS and (gpu := _kernel.triton(k, v)):
        return gpu.store_kv(k, v, pool, slots)
    run = _kernel.run
    native = on_cpu(k, v) and holds(pool) and (v is None or k.dtype == v.dtype)
    if run is None or not native or slots.dtype != torch.int32:
        return reference(k, v, pool, slots)
    v_token, v_head, v_dim = (0, 0, 0) if v is None else (v.stride(0), v.stride(1), v.shape[2])
    run(
        k.data_ptr(), None if v is None else v.data_ptr(), pool.data_ptr(), slots.data_ptr(), k.shape[0], k.shape[1],
        pool.shape[3], k.stride(0), k.stride(1), v_token, v_head, k.shape[2], v_dim, pool.shape[0],
        DTYPES[k.dtype], FORMATS[pool.dtype],
    )  # fmt: skip
    return None
