"""FlashInfer's wrappers for attention over pages in plain PyTorch: its signatures, and the semantics that it documents.

It stands in for the package where there is no GPU. What it is asked for and does not compute it refuses, as the package refuses
or worse; `CALLS` has every call, so that a test can hold them against the package's own signatures where that is installed.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import graphs
import streams
import torch
from elsewhere import Elsewhere
from torch.utils._pytree import tree_map_only

CALLS: list[tuple[str, str, tuple, dict]] = []  # class, method, arguments
DTYPES = {torch.float16, torch.bfloat16}
KEPT = {torch.float8_e4m3fn, torch.float8_e5m2}
HEAD_DIMS = {64, 128, 256}
GROUPS = {1, 2, 3, 4, 8}  # that its kernel without tensor cores is compiled for


def get_alibi_slopes(n_heads, device=None):
    """The slopes that its kernels add where ALIBI is asked for, whatever the model's are."""
    n = 2 ** math.floor(math.log2(n_heads))
    first, between = 2 ** (-8 / n), 2 ** (-4 / n)
    return torch.tensor([first ** (i + 1) for i in range(n)] + [between ** (2 * i + 1) for i in range(n_heads - n)], device=device)


def noted(method):
    """The method, whose calls are kept as they are made."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        CALLS.append((type(self).__name__, method.__name__, args, kwargs))
        return method(self, *args, **kwargs)

    return call


utils = SimpleNamespace(get_alibi_slopes=get_alibi_slopes)


class BatchPrefillWithPagedKVCacheWrapper:
    """Queries of any number to a request, the last of them at the request's last key."""

    @noted
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None, paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend="auto",
        jit_args=None, jit_kwargs=None,
    ):  # fmt: skip
        _refuse(custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs)
        self._rows = _Rows(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._rows.buffers = [qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf]

    @noted
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
        page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None,
        q_data_type="float16", kv_data_type=None, o_data_type=None, non_blocking=True,
    ):  # fmt: skip
        _refuse(head_dim_vo, custom_mask, packed_custom_mask, rope_scale, rope_theta, o_data_type, use_fp16_qk_reduction or None)
        self._rows.keep(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._how = _How(
            num_qo_heads, num_kv_heads, head_dim_qk, page_size, causal, pos_encoding_mode, sm_scale, window_left, logits_soft_cap,
            q_data_type, kv_data_type,
        )  # fmt: skip

    @noted
    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None,
    ):  # fmt: skip
        """`sinks` is for kernels that never serve these calls; the others leave them out."""
        _refuse(q_scale, k_scale, v_scale, out, lse, window_left)
        return self._attend(q, paged_kv_cache, args, return_lse)

    def _attend(self, q, cache, args, return_lse):
        assert not args, "only kernels of one's own take more"
        return attend(self._rows, self._how, q, cache, None, self._how.scale, return_lse)


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """The same with a logit for each head that takes its share and gives nothing: run(q, cache, sinks, scale)."""

    @noted
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None, paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend="auto",
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        head_dim_qk=128, head_dim_vo=128, window_left=-1,
    ):  # fmt: skip
        _refuse(custom_mask_buf, mask_indptr_buf, use_fp16_qk_reduction or None)
        assert pos_encoding_mode == "NONE"
        self._rows = _Rows(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._rows.buffers = [qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf]
        self._compiled = (q_data_type, kv_data_type, head_dim_qk, head_dim_vo, window_left >= 0)

    def _attend(self, q, cache, args, return_lse):
        sinks, scale = args
        how = self._how
        assert self._compiled == (how.q_dtype, how.kv_dtype, how.dim, how.dim, how.window_left >= 0), "planned as it was compiled"
        assert not how.softcap and not how.alibi, "its kernel knows neither"
        assert sinks.dtype == torch.float32 and sinks.shape == (how.heads,)
        return attend(self._rows, how, q, cache, sinks, scale, return_lse)


class BatchDecodeWithPagedKVCacheWrapper:
    """One query to a request, which sees all of its keys."""

    @noted
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend="auto", jit_args=None,
    ):  # fmt: skip
        _refuse(jit_args)
        self._rows = _Rows(float_workspace_buffer, kv_layout, use_cuda_graph)
        start = None
        if use_cuda_graph:
            start = torch.arange(len(paged_kv_indptr_buffer), dtype=torch.int32, device=float_workspace_buffer.device)
        self._rows.buffers = [start, paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer]
        self._tensor_cores = use_tensor_cores

    @noted
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode="NONE",
        window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None, o_data_type=None, data_type=None,
        sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True,
    ):  # fmt: skip
        _refuse(o_data_type, data_type, rope_scale, rope_theta)
        group = num_qo_heads // num_kv_heads
        assert self._tensor_cores or group in GROUPS, f"Unsupported group_size: {group}"
        self._rows.keep(torch.arange(len(last_page_len) + 1, dtype=torch.int32), indptr, indices, last_page_len)
        self._how = _How(
            num_qo_heads, num_kv_heads, head_dim, page_size, False, pos_encoding_mode, sm_scale, window_left, logits_soft_cap,
            q_data_type, kv_data_type,
        )  # fmt: skip

    @noted
    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, sinks=None,
    ):  # fmt: skip
        """`sinks` as above."""
        _refuse(q_scale, k_scale, v_scale, out, lse, window_left)
        assert not args
        return attend(self._rows, self._how, q, paged_kv_cache, None, self._how.scale, return_lse)


class _Rows:
    """Where requests' queries and keys lie: on the device, in buffers of the caller's where CUDA graphs are to read them."""

    def __init__(self, workspace, layout, graph):
        assert layout in ("NHD", "HND") and workspace.data_ptr() % 16 == 0
        self.place, self.layout, self.graph = workspace.device, layout, graph
        self._copied = streams.Event()

    def keep(self, *given):
        """A plan, which leaves pinned memory of the wrapper's by a copy that nobody waits for."""
        assert self._copied.query(), "the last plan is still in pinned memory"
        waits = list(streams.WAITS)
        self._keep(*given)
        # Of what lies on the host, only pages are waited for.
        streams.WAITS[:] = waits if isinstance(given[2], Elsewhere) else [*waits, "plan"]
        self._copied.record()

    def _keep(self, *given):
        for tensor in given:
            assert tensor.dtype == torch.int32
        if not self.graph:
            self.buffers = [tensor.to(self.place, copy=True) for tensor in given]
            return
        for buffer, tensor in zip(self.buffers, given, strict=True):
            fixed = buffer is not self.buffers[2]
            assert len(buffer) == len(tensor) if fixed else len(buffer) >= len(tensor), "a graph's sizes are fixed"
            buffer[: len(tensor)].copy_(tensor)


class _How:
    """One plan, checked as the package checks it or as its kernels fail."""

    def __init__(self, heads, kv_heads, dim, page_size, causal, encoding, scale, window_left, softcap, q_dtype, kv_dtype):
        kv_dtype = kv_dtype or q_dtype
        assert dim in HEAD_DIMS, f"Unsupported head_dim: {dim}"
        assert q_dtype in DTYPES, f"no kernel for queries in {q_dtype}"
        assert kv_dtype == q_dtype or kv_dtype in KEPT, f"no kernel for keys in {kv_dtype}"
        assert heads % kv_heads == 0 and encoding in ("NONE", "ALIBI") and window_left >= -1
        self.heads, self.kv_heads, self.dim, self.page_size, self.causal = heads, kv_heads, dim, page_size, causal
        self.alibi, self.window_left, self.softcap = encoding == "ALIBI", window_left, softcap or 0.0
        self.scale = dim**-0.5 if scale is None else scale
        self.q_dtype, self.kv_dtype = q_dtype, kv_dtype


def attend(rows, how, q, cache, sinks, scale, return_lse):
    """q [qo_indptr[-1], heads, dim] · cache [pages, 2, kv_heads, page_size, dim] in HND, its third and fourth turned in NHD."""
    page = (how.page_size, how.kv_heads) if rows.layout == "NHD" else (how.kv_heads, how.page_size)
    assert cache.shape[1:] == (2, *page, how.dim), f"pages of {tuple(cache.shape)} were not planned"
    if q.dtype != how.q_dtype or cache.dtype != how.kv_dtype:
        raise ValueError(f"planned for {how.q_dtype} over {how.kv_dtype}, and {q.dtype} over {cache.dtype} came")
    out, levels = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tokens_first = rows.layout == "NHD"
    launched(_kernel, how, scale, tokens_first, out, levels, q, cache, sinks, *rows.buffers)
    return (out, levels) if return_lse else out


def launched(kernel, *args):
    """Run a kernel on the device, which a graph that is being captured keeps: it reads and writes where tensors lie."""
    held = tree_map_only(Elsewhere, lambda tensor: tensor.held, args)

    def launch(*args):
        with torch._C._DisableTorchDispatch():
            kernel(*args)

    launch(*held)
    if (graph := graphs.active()) is not None:
        graph.note(launch, held, {}, {id(tensor) for tensor in held if isinstance(tensor, torch.Tensor)})


def _kernel(how, scale, tokens_first, out, levels, q, cache, sinks, starts, page_starts, pages, lasts):
    starts, page_starts, lasts = starts.tolist(), page_starts.tolist(), lasts.tolist()
    if q.shape != (starts[-1], how.heads, how.dim):
        raise ValueError(f"q.shape {tuple(q.shape)} does not match qo_indptr[-1] {starts[-1]}")
    for n, last in enumerate(lasts):
        held = pages[page_starts[n] : page_starts[n + 1]].long()
        assert 1 <= last <= how.page_size and len(held), "a request has at least one key"
        length = (len(held) - 1) * how.page_size + last
        kept = cache[held].float()
        both = (kept.transpose(2, 3) if tokens_first else kept).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        k, v = both.repeat_interleave(how.heads // how.kv_heads, 1)
        mine = slice(starts[n], starts[n + 1])
        answers, of_keys = _one(how, q[mine].float().transpose(0, 1), k, v, sinks, scale)
        out[mine], levels[mine] = answers.to(out.dtype), of_keys


def _one(how, q, k, v, sinks, scale):
    """A request's queries [heads, m, dim] to its keys [heads, n, dim]: their answers [m, heads, dim], and the LSE in base 2."""
    m, n = q.shape[1], k.shape[1]
    row, key = torch.arange(m, device=q.device)[:, None], torch.arange(n, device=q.device)
    logits = q @ k.mT * scale
    if how.alibi:  # by the row's number among the queries, not its position: the same but for a constant of the row
        logits = logits + get_alibi_slopes(how.heads, q.device)[:, None, None] * (key - row)
    if how.softcap:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    seen = key + m <= row + n if how.causal else torch.ones_like(key - row, dtype=torch.bool)
    if how.window_left >= 0:
        seen = seen & (key + m + how.window_left >= n + row)
    logits = (logits * math.log2(math.e)).masked_fill(~seen, -math.inf)
    top = logits.amax(-1, keepdim=True)
    shares = torch.exp2(logits - top)
    total = shares.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp2((sinks * math.log2(math.e))[:, None, None] - top)
    return (shares @ v / total).transpose(0, 1), (top + torch.log2(total))[..., 0].T


def _refuse(*unset):
    assert all(value is None for value in unset), "asked for what is not computed here"
