"""The recurrence of Mamba 2 over ragged sequences: every head decays as one (Dao and Gu, arXiv 2405.21060)."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from kvrun_kernels.dispatch import DTYPES, Kernel
from kvrun_kernels.recurrent import in_order, native_reads

SCHEMA = (
    "ssd_scan(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor d, Tensor dt_bias, Tensor query_start, "
    "Tensor slots, Tensor fresh, Tensor(a!) state, Tensor? z=None, *, float least=0.0, float most=inf) -> Tensor"
)

_kernel = Kernel("ssd_scan", "pppppp ppp pppp iii iiii iiiii ff iii")


def reference(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    query_start: Tensor,
    slots: Tensor,
    fresh: Tensor,
    state: Tensor,
    z: Tensor | None = None,
    *,
    least: float = 0.0,
    most: float = math.inf,
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    starts, shared = query_start.tolist(), x.shape[1] // b.shape[1]
    steps = functional.softplus(dt.float() + dt_bias.float()).clamp(least, most)
    for n, slot in enumerate(slots.tolist()):
        h = torch.zeros_like(state[slot]) if fresh[n] else state[slot].clone()
        for t in range(starts[n], starts[n + 1]):
            into, outof = (v[t].float().repeat_interleave(shared, dim=0) for v in (b, c))
            gain = steps[t].unsqueeze(1) * x[t].float()
            h = h * torch.exp(steps[t] * a.float()).view(-1, 1, 1) + gain.unsqueeze(2) * into.unsqueeze(1)
            y = (h @ outof.unsqueeze(2)).squeeze(2) + d.float().unsqueeze(1) * x[t].float()
            out[t] = (y if z is None else y * functional.silu(z[t].float())).to(x.dtype)
        if starts[n] < starts[n + 1]:
            state[slot] = h
    return out


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    query_start: Tensor,
    slots: Tensor,
    fresh: Tensor,
    state: Tensor,
    z: Tensor | None = None,
    *,
    least: float = 0.0,
    most: float = math.inf,
) -> Tensor:
    """Carry each head's state through its sequence: h = h * exp(dt * a) + dt * x b^T, y = h c + d * x, times silu(z).

    x, z [tokens, heads, dim] · dt [tokens, heads] as projected: its bias and softplus are applied here, and the result is
    kept within least..most · a [heads] float32, which is -exp(A_log) · b, c [tokens, groups, size]: heads h of
    heads / groups neighbours share one · d, dt_bias [heads] float32 · query_start [sequences + 1] int32: sequence n owns
    rows query_start[n] to query_start[n + 1] · slots [sequences] int32: where its state lies, no two the same · fresh
    [sequences] bool: it begins here, whatever its slot holds · state [slots, heads, dim, size] float32, written in place ·
    out [tokens, heads, dim], dtype of x.

    Everything in between is float32. A row's result is the same to the bit however the prompt is chunked and whatever else
    is in the batch.
    """
    heads, dim, size = x.shape[1], x.shape[2], b.shape[2]
    if state.dtype != torch.float32 or state.shape[1:] != (heads, dim, size):
        raise ValueError(
            f"state [slots, {heads}, {dim}, {size}] in float32 asked by x and b, found {list(state.shape)} in {state.dtype}; cut them alike"
        )
    if heads % b.shape[1]:
        raise ValueError(f"{heads} heads over {b.shape[1]} groups; the first must be a multiple of the second")
    tables, run = (a, d, dt_bias, state), _kernel.run
    plain = in_order(tables, fresh)
    plain = plain and all(t is None or t.stride(1) == t.shape[2] for t in (x, z, b, c))
    if plain and (gpu := _kernel.triton(x, dt, b, c, z, *tables)):
        return gpu.ssd_scan(x, dt, a, b, c, d, dt_bias, query_start, slots, fresh, state, z, least, most)
    if run is None or not plain or not native_reads(x, dt, b, c, z, tables, query_start, slots):
        return reference(x, dt, a, b, c, d, dt_bias, query_start, slots, fresh, state, z, least=least, most=most)
    out = torch.empty(x.shape, dtype=x.dtype)
    run(
        out.data_ptr(), x.data_ptr(), dt.data_ptr(), None if z is None else z.data_ptr(), b.data_ptr(), c.data_ptr(),
        a.data_ptr(), d.data_ptr(), dt_bias.data_ptr(),
        state.data_ptr(), query_start.data_ptr(), slots.data_ptr(), fresh.data_ptr(),
        x.shape[0], slots.shape[0], state.shape[0],
        heads, dim, b.shape[1], size,
        x.stride(0), dt.stride(0), 0 if z is None else z.stride(0), b.stride(0), c.stride(0), least, most,
        DTYPES[x.dtype], DTYPES[dt.dtype], DTYPES[b.dtype],
    )  # fmt: skip
    return out
