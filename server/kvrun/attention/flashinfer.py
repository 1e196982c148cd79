"""Attention by FlashInfer's kernels over pages on a GPU: each step is planned once for every shape of layers that they serve.

What they lack goes to the ops of `kvrun_kernels`, each kind of layer for a reason that `serving` tells. Pages are handed over as
they lie: FlashInfer calls [pages, 2, kv_heads, page_tokens, head_dim] the layout HND. Its calls are those of 0.6.6 to 0.7.2.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvrun.attention.backend import HostRows, Kind, Ragged, Scores
from kvrun.attention.native import NativeStep
from kvrun.state.pages import KvPages, stored_name
from kvrun.state.shapes import PageUse

LEAST = (8, 0)  # compute capability
DTYPES = {torch.float16, torch.bfloat16}
BYTES = {torch.float8_e4m3fn, torch.float8_e5m2}  # kept without a scale, as it reads them where it is given none
HEAD_DIMS = {64, 128, 256}
LAYOUT = "HND"
# From so many query heads to a key head on, decoding multiplies matrices; its kernel for fewer is compiled for 1, 2 and 3 everywhere.
TENSOR_CORES = 4
# Splits of contexts leave here, for two blocks on each processor, tiles of 128 rows of (head_dim) float32 for each head of a group:
# 16 heads of 128 on 132 processors need 264 MiB.
WORKSPACE_BYTES = 384 << 20


def missing(capability: tuple[int, int] | None) -> str:
    """Why FlashInfer cannot serve here, "" if it can. capability: of the GPU, None on a CPU"""
    if capability is None:
        return "FlashInfer computes on GPUs, and this shard does not"
    if capability < LEAST:
        return f"FlashInfer needs compute capability {LEAST[0]}.{LEAST[1]}, and this GPU has {capability[0]}.{capability[1]}"
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed; pip install 'kvrun[cuda]' brings it"
    try:
        library()
    except Exception as error:  # of any of the packages that it stands on
        return f"FlashInfer is installed and cannot be imported: {error}"
    if find_spec("flashinfer_jit_cache") is None and not _compiler():
        return "FlashInfer compiles its kernels on first use, and nvcc is not here; install the CUDA toolkit, or flashinfer-jit-cache"
    return ""


def library() -> ModuleType:
    """The package, which takes seconds to import."""
    return importlib.import_module("flashinfer")


def _compiler() -> bool:
    try:
        root = importlib.import_module("flashinfer.jit.cpp_ext").get_cuda_path()
    except RuntimeError:
        return False
    return (Path(root) / "bin" / "nvcc").exists()


@dataclass(frozen=True)
class Shape:
    """What a plan depends on beside the rows of a step, so layers of one shape share it."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int  # 0 = all keys
    softcap: float
    slopes: bool
    sinks: bool

    @classmethod
    def of(cls, kind: Kind) -> Shape:
        """The shape of a kind of layer."""
        s = kind.scores
        return cls(kind.heads, kind.kv_heads, kind.head_dim, s.scale, s.window, s.softcap, s.slopes is not None, s.sinks is not None)


@dataclass(frozen=True)
class PagedRows:
    """The rows of a step as FlashInfer takes them: tensors on the host, int32. Pages may lie on the device too."""

    query_start: Tensor  # [N + 1]
    page_start: Tensor  # [N + 1]: row n has pages[page_start[n]] to pages[page_start[n + 1]]
    pages: Tensor  # [page_start[N]]
    last_page_tokens: Tensor  # [N], 1 to page_tokens
    single: bool  # every row is one token

    @classmethod
    def of(cls, rows: HostRows, page_tokens: int) -> PagedRows:
        """Take a page table apart."""
        counts: np.ndarray = -(-rows.contexts // page_tokens)
        starts = np.concatenate([[0], np.cumsum(counts)])
        held = rows.page_table[np.arange(rows.page_table.shape[1]) < counts[:, None]]
        last = rows.contexts - (counts - 1) * page_tokens
        query_start, page_start, pages, last_page_tokens = (_int32(array) for array in (rows.query_start, starts, held, last))
        return cls(query_start, page_start, pages, last_page_tokens, single=bool((np.diff(rows.query_start) == 1).all()))


@dataclass(frozen=True)
class FlashInferStep(NativeStep):
    """A step, planned for the shapes of its layers; those of other kinds are run as a NativeStep runs them."""

    backend: FlashInfer
    planned: dict[Shape, Any] = field(default_factory=dict)  # the wrapper that holds each plan

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores) -> Tensor:
        """See AttentionStep."""
        pool = self.kv.layers[layer]
        shape = None
        if self.batch.reach is None:
            shape = self.backend.shape(Kind(q.shape[1], pool.shape[2], q.shape[2], scores), pool.dtype)
        if shape is None:
            return super().run(layer, q, k, v, scores)
        if shape not in self.planned:
            # The rows of a batch that says nothing to the host are waited for, once for the step.
            self.backend.prepare(self, (shape,))
        self.store(layer, k, v)
        wrapper = self.planned[shape]
        return wrapper.run(q, pool) if scores.sinks is None else wrapper.run(q, pool, scores.sinks, scores.scale)

    def renew(self, batch: Ragged) -> None:
        """See AttentionStep."""
        rows = _padded(batch.host or _fetched(batch), len(self.batch.contexts), self.kv.pages)
        self.backend.replan(self, PagedRows.of(rows, self.kv.page_tokens))


class FlashInfer:
    """The backend of GPUs that FlashInfer knows; see `missing`."""

    def __init__(self, package: ModuleType, kinds: Sequence[Kind], dtype: torch.dtype, place: torch.device) -> None:
        """kinds: of the model's layers; others are never served · dtype: of queries · place: where they lie"""
        self._package, self._dtype, self._place = package, dtype, place
        self._lacking = {kind: self._lacks(kind) for kind in dict.fromkeys(kinds)}
        self._wrappers: dict[tuple[Shape, torch.dtype, bool], Any] = {}
        self._fixed: dict[tuple[Shape, torch.dtype, torch.Size], Any] = {}
        served = not all(self._lacking.values())
        self._planned = torch.cuda.Event()  # behind the copies of the last plans
        # Of zeros, because some kernels keep counters there that they leave as they found them.
        self._workspace = torch.zeros(WORKSPACE_BYTES if served else 0, dtype=torch.uint8, device=place)

    def plan(self, batch: Ragged, kv: KvPages) -> NativeStep:
        """See AttentionBackend. Waits for the device only where the batch has no rows on the host."""
        step = FlashInferStep(batch, kv, self)
        if batch.host is not None and batch.reach is None:
            self.prepare(step, self._shapes(kv))
        return step

    def fixed(self, batch: Ragged, kv: KvPages) -> NativeStep:
        """See AttentionBackend. Plans lie outside of what is computed again, in buffers that it reads."""
        step = FlashInferStep(batch, kv, self)
        for shape in self._shapes(kv):
            key = (shape, kv.layers[0].dtype, batch.page_table.shape)
            if key not in self._fixed:
                self._fixed[key] = self._wrapper(shape, kv.layers[0].dtype, not shape.sinks, self._buffers(batch.page_table))
            step.planned[shape] = self._fixed[key]
        step.renew(batch)
        return step

    def prepare(self, step: FlashInferStep, shapes: Iterable[Shape]) -> None:
        """Plan a step for these shapes."""
        kv, batch = step.kv, step.batch
        rows = self._carried(PagedRows.of(batch.host or _fetched(batch), kv.page_tokens))
        for shape in shapes:
            single = rows.single and not shape.sinks
            key = (shape, kv.layers[0].dtype, single)
            if key not in self._wrappers:
                self._wrappers[key] = self._wrapper(*key)
            step.planned[shape] = self._wrappers[key]
            self._plan(shape, rows, kv, self._wrappers[key], single)
        self._planned.record()

    def replan(self, step: FlashInferStep, rows: PagedRows) -> None:
        """Plan all shapes of a fixed step for other rows."""
        rows = self._carried(rows)
        for shape, wrapper in step.planned.items():
            self._plan(shape, rows, step.kv, wrapper, not shape.sinks)
        self._planned.record()

    def shape(self, kind: Kind, stored: torch.dtype) -> Shape | None:
        """The shape that a kind of layer is served as over a pool of this dtype; None where it is not."""
        served = not self._lacking.get(kind, "unknown") and not self._lacks_over(kind, stored)
        return Shape.of(kind) if served else None

    def serving(self, stored: torch.dtype) -> dict[str, str]:
        """See AttentionBackend."""
        said = {}
        for kind, lacking in self._lacking.items():
            why = lacking or self._lacks_over(kind, stored)
            said[f"attention, {kind}"] = f"triton, for FlashInfer lacks {why}" if why else "flashinfer"
        return said

    def _lacks(self, kind: Kind) -> str:
        """What of a kind of layer the library has no kernel for, in words; "" if all is there."""
        s = kind.scores
        lacking = {
            f"queries in {str(self._dtype).removeprefix('torch.')}": self._dtype not in DTYPES,
            f"heads of {kind.head_dim}": kind.head_dim not in HEAD_DIMS,
            "a value within the key": s.value_dim is not None,
            "what sees a source at once": kind.use is not PageUse.SEQUENCE,
            "learned distances": s.relative is not None,
            # It adds slopes before it caps, and knows positions up to a constant, which sinks would notice.
            "slopes beside caps or sinks": s.slopes is not None and (s.softcap > 0 or s.sinks is not None),
            "caps beside sinks": s.softcap > 0 and s.sinks is not None,
            "slopes but those of all heads of a model": s.slopes is not None and not self._usual(s.slopes),
        }
        return next((what for what, is_lacking in lacking.items() if is_lacking), "")

    def _lacks_over(self, kind: Kind, stored: torch.dtype) -> str:
        """The same of a pool's dtype."""
        if stored == self._dtype or (stored in BYTES and kind.scores.sinks is None):
            return ""
        return f"pages in {stored_name(stored)}" + (" beside sinks" if stored in BYTES else "")

    def _usual(self, slopes: Tensor) -> bool:
        """Whether these are the slopes that the kernels take, which are a function of the number of heads."""
        return bool(torch.allclose(slopes.cpu(), self._package.utils.get_alibi_slopes(len(slopes)).cpu()))

    def _shapes(self, kv: KvPages) -> dict[Shape, None]:
        """The shapes of all layers that are served over these pages."""
        if not kv.layers:
            return {}
        found = (self.shape(kind, kv.layers[0].dtype) for kind in self._lacking)
        return dict.fromkeys(shape for shape in found if shape is not None)

    def _carried(self, rows: PagedRows) -> PagedRows:
        """Rows to plan by, their pages on the device: for those of the host a plan would wait, and for all that was launched before."""
        # Plans leave pinned memory by copies that nobody waits for, and write the same memory again.
        self._planned.synchronize()
        staged = torch.empty(len(rows.pages), dtype=torch.int32, pin_memory=True).copy_(rows.pages)
        return replace(rows, pages=staged.to(self._place, non_blocking=True))

    def _plan(self, shape: Shape, rows: PagedRows, kv: KvPages, wrapper: Any, single: bool) -> None:
        heads = (shape.heads, shape.kv_heads, shape.head_dim, kv.page_tokens)
        pages = (rows.page_start, rows.pages, rows.last_page_tokens)
        how: dict[str, Any] = {
            "pos_encoding_mode": "ALIBI" if shape.slopes else "NONE",
            "sm_scale": shape.scale,
            "window_left": shape.window - 1,  # it does not count the query's own position; -1 = all keys
            "logits_soft_cap": shape.softcap,
            "q_data_type": self._dtype,
            "kv_data_type": kv.layers[0].dtype,
        }
        if single:
            wrapper.plan(*pages, *heads, **how)
        else:
            wrapper.plan(rows.query_start, *pages, *heads, causal=True, **how)

    def _wrapper(self, shape: Shape, stored: torch.dtype, single: bool, buffers: Sequence[Tensor] = ()) -> Any:
        """What plans and runs one shape. All share the workspace, for they run one after another.

        single: rows are one token each · buffers: where plans leave the rows, for what always reads them there
        """
        package, page_buffers = self._package, ("paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
        if shape.sinks:
            # The other two take sinks as well, and leave them out on the kernels that serve here.
            return package.BatchAttentionWithAttentionSinkWrapper(
                self._workspace,
                LAYOUT,
                use_cuda_graph=bool(buffers),
                q_data_type=self._dtype,
                kv_data_type=stored,
                head_dim_qk=shape.head_dim,
                head_dim_vo=shape.head_dim,
                window_left=shape.window - 1,
                **dict(zip(("qo_indptr_buf", *page_buffers), buffers)),
            )
        if single:
            return package.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                LAYOUT,
                use_cuda_graph=bool(buffers),
                use_tensor_cores=shape.heads // shape.kv_heads >= TENSOR_CORES,
                **dict(zip((f"{name}fer" for name in page_buffers), buffers[1:])),
            )
        return package.BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT)

    def _buffers(self, table: Tensor) -> list[Tensor]:
        """Room for the rows of a page table of this shape."""
        rows, width = table.shape
        return [torch.zeros(size, dtype=torch.int32, device=self._place) for size in (rows + 1, rows + 1, rows * width, rows)]


def _padded(rows: HostRows, count: int, page: int) -> HostRows:
    """So many rows of one token: these, and after them some whose one key lies in this page."""
    more = count - len(rows.contexts)
    contexts = np.pad(rows.contexts, (0, more), constant_values=1)
    return HostRows(np.arange(count + 1), contexts, np.pad(rows.page_table, ((0, more), (0, 0)), constant_values=page))


def _int32(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.int32))


def _fetched(batch: Ragged) -> HostRows:
    """The rows of a batch that are known on the device only."""
    return HostRows(batch.query_start.cpu().numpy(), batch.contexts.cpu().numpy(), batch.page_table.cpu().numpy())
