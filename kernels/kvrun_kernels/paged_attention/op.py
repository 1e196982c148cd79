"""Causal attention of ragged query rows over the pages of their sequences."""

import torch
from torch import Tensor

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu
from kvrun_kernels.stored import FORMATS, holds, stored_width, widen

SCHEMA = (
    "paged_attention(Tensor q, Tensor pool, Tensor query_start, Tensor contexts, Tensor page_table, float scale, "
    "int window=0, float softcap=0.0, Tensor? slopes=None, *, Tensor? sinks=None, Tensor? reach=None, "
    "Tensor? relative=None, int? value_dim=None) -> Tensor"
)

_kernel = Kernel("paged_attention", "pppppp pppp iiiii iiii iiii ff ii")


def reference(
    q: Tensor,
    pool: Tensor,
    query_start: Tensor,
    contexts: Tensor,
    page_table: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    reach: Tensor | None = None,
    relative: Tensor | None = None,
    value_dim: int | None = None,
) -> Tensor:
    value_dim = value_dim or q.shape[2]
    out = torch.zeros((*q.shape[:2], value_dim), dtype=q.dtype, device=q.device)
    group = q.shape[1] // pool.shape[2]
    for n, context in enumerate(contexts.tolist()):
        start, stop = int(query_start[n]), int(query_start[n + 1])
        if start == stop:
            continue
        pages = widen(pool[page_table[n, : -(-context // pool.shape[3])].long()])
        planes = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context].repeat_interleave(group, dim=1)
        keys, values = planes[0], planes[-1][..., :value_dim]
        scores = torch.einsum("thd,hkd->htk", q[start:stop].float(), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        query_at = torch.arange(context - (stop - start), context, device=q.device).unsqueeze(1)
        key_at = torch.arange(context, device=q.device)
        if slopes is not None:
            scores = scores + slopes.float().view(-1, 1, 1) * (key_at - query_at)
        if relative is not None:
            most = relative.shape[1] // 2
            scores = scores + relative.float()[:, (key_at - query_at).clamp(-most, most) + most]
        hidden = key_at > (query_at if reach is None else reach[start:stop].unsqueeze(1))
        if window:
            hidden = hidden | (query_at - key_at >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, stop - start, 1)), dim=-1)
        # A row that sees no key has no shares to give.
        shares = scores.softmax(-1)[..., :context].masked_fill(hidden.all(-1, keepdim=True), 0.0)
        out[start:stop] = torch.einsum("htk,hkd->thd", shares, values).to(q.dtype)
    return out


def paged_attention(
    q: Tensor,
    pool: Tensor,
    query_start: Tensor,
    contexts: Tensor,
    page_table: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    reach: Tensor | None = None,
    relative: Tensor | None = None,
    value_dim: int | None = None,
) -> Tensor:
    """Attend each query row to its sequence's pages; prompts, chunks of prompts and single tokens in one call.

    q [tokens, q_heads, dim] · pool [pages, 2, kv_heads, page_tokens, dim], or [pages, 1, ...] where the keys' first
    numbers are the values too (MLA's latents) · query_start [sequences + 1] int32: sequence n owns query rows
    query_start[n] to query_start[n + 1] · contexts [sequences] int32: its last row sits at position contexts[n] - 1 ·
    page_table [sequences, pages of the longest] int32 · out [tokens, q_heads, value_dim], which is dim unless said.

    What a score becomes, in this order: times scale · softcap c > 0: c * tanh(score / c) · slopes [q_heads] float32:
    ALiBi, adds slope * (j - i) for key j and query i · relative [q_heads, 2R + 1] float32: adds
    relative[head, clamp(j - i, -R, R) + R] (T5) · sinks [q_heads] float32: a logit that takes its share of the softmax
    and has no value.

    What a row sees: the keys up to its own position, or with reach [tokens] int32 up to key reach[row], of those that its
    sequence has · window w > 0: of these only j with i - j < w. A row that sees nothing gets zeros.

    A pool of 8-bit numbers is read as `store_kv` wrote it (`stored.py`).

    A row's result is the same to the bit however the prompt is chunked and whatever else is in the batch.
    """
    if q.shape[1] % pool.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads over {pool.shape[2]} key heads; the first must be a multiple of the second")
    if value_dim and value_dim > q.shape[2]:
        raise ValueError(f"values of {value_dim} asked in a pool of {q.shape[2]} numbers a token; ask for at most these")
    if pool.shape[4] != stored_width(q.shape[2], pool.dtype):
        raise ValueError(f"queries of {q.shape[2]} numbers asked of a pool whose rows have {pool.shape[4]} elements of {pool.dtype}")
    integers, floats = (query_start, contexts, page_table, reach), (slopes, sinks, relative)
    run = _kernel.run
    plain = all(t is None or (t.dtype == torch.int32 and t.stride(-1) == 1) for t in integers)
    plain = plain and all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in floats)
    if plain and pool.dtype in FORMATS and pool.is_contiguous() and (gpu := _kernel.triton(q, *floats)):
        return gpu.paged_attention(
            q, pool, query_start, contexts, page_table, scale, window, softcap, slopes, sinks, reach, relative, value_dim or q.shape[2]
        )
    if run is None or not plain or not on_cpu(q, *floats) or not holds(pool):
        return reference(
            q, pool, query_start, contexts, page_table, scale, window, softcap, slopes,
            sinks=sinks, reach=reach, relative=relative, value_dim=value_dim,
        )  # fmt: skip
    value_dim = value_dim or q.shape[2]
    out = torch.empty((*q.shape[:2], value_dim), dtype=q.dtype)
    run(
        out.data_ptr(), q.data_ptr(), pool.data_ptr(), query_start.data_ptr(), contexts.data_ptr(), page_table.data_ptr(),
        *(None if t is None else t.data_ptr() for t in (reach, *floats)),
        q.shape[1], pool.shape[2], q.shape[2], value_dim, pool.shape[1],
        contexts.shape[0], page_table.stride(0), pool.shape[3], pool.shape[0],
        q.stride(0), q.stride(1), window, 0 if relative is None else relative.shape[1] // 2, scale, softcap,
        DTYPES[q.dtype], FORMATS[pool.dtype],
    )  # fmt: skip
    return out
