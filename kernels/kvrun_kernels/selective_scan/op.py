"""The recurrence of Mamba over ragged sequences: every channel has a small state of its own (Gu and Dao, arXiv 2312.00752)."""

import torch
from torch import Tensor
from torch.nn import functional

from kvrun_kernels.dispatch import DTYPES, Kernel
from kvrun_kernels.recurrent import in_order, native_reads

SCHEMA = (
    "selective_scan(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor d, Tensor dt_bias, Tensor query_start, "
    "Tensor slots, Tensor fresh, Tensor(a!) state, Tensor? z=None) -> Tensor"
)

_kernel = Kernel("selective_scan", "pppppp ppp pppp iiiii iiiii iii")


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
) -> Tensor:
    out = torch.empty_like(x)
    starts = query_start.tolist()
    steps = functional.softplus(dt.float() + dt_bias.float())
    for n, slot in enumerate(slots.tolist()):
        h = torch.zeros_like(state[slot]) if fresh[n] else state[slot].clone()
        for t in range(starts[n], starts[n + 1]):
            step = steps[t].unsqueeze(1)
            h = h * torch.exp(step * a.float()) + step * x[t].float().unsqueeze(1) * b[t].float()
            y = h @ c[t].float() + d.float() * x[t].float()
            out[t] = (y if z is None else y * functional.silu(z[t].float())).to(x.dtype)
        if starts[n] < starts[n + 1]:
            state[slot] = h
    return out


def selective_scan(
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
) -> Tensor:
    """Carry each channel's state through its sequence: h = h * exp(dt * a) + dt * x * b, y = h . c + d * x, times silu(z).

    x, dt, z [tokens, channels], dt as projected: its bias and softplus are applied here · a [channels, size] float32,
    which is -exp(A_log) · b, c [tokens, size] · d, dt_bias [channels] float32 · query_start [sequences + 1] int32:
    sequence n owns rows query_start[n] to query_start[n + 1] · slots [sequences] int32: where its state lies, no two the
    same · fresh [sequences] bool: it begins here, whatever its slot holds · state [slots, channels, size] float32, written
    in place · out [tokens, channels], dtype of x.

    Everything in between is float32. A row's result is the same to the bit however the prompt is chunked and whatever else
    is in the batch.
    """
    if state.dtype != torch.float32 or state.shape[1:] != a.shape or x.shape[1:] != a.shape[:1]:
        raise ValueError(
            f"state [slots, {a.shape[0]}, {a.shape[1]}] in float32 and x [tokens, {a.shape[0]}] asked by a, found "
            f"{list(state.shape)} in {state.dtype} and {list(x.shape)}; cut them alike"
        )
    tables, run = (a, d, dt_bias, state), _kernel.run
    plain = in_order(tables, fresh)
    if plain and (gpu := _kernel.triton(x, dt, b, c, z, *tables)):
        return gpu.selective_scan(x, dt, a, b, c, d, dt_bias, query_start, slots, fresh, state, z)
    if run is None or not plain or not native_reads(x, dt, b, c, z, tables, query_start, slots):
        return reference(x, dt, a, b, c, d, dt_bias, query_start, slots, fresh, state, z)
    out = torch.empty(x.shape, dtype=x.dtype)
    run(
        out.data_ptr(), x.data_ptr(), dt.data_ptr(), None if z is None else z.data_ptr(), b.data_ptr(), c.data_ptr(),
        a.data_ptr(), d.data_ptr(), dt_bias.data_ptr(),
        state.data_ptr(), query_start.data_ptr(), slots.data_ptr(), fresh.data_ptr(),
        x.shape[0], slots.shape[0], state.shape[0], x.shape[1], b.shape[1],
        x.stride(0), dt.stride(0), 0 if z is None else z.stride(0), b.stride(0), c.stride(0),
        DTYPES[x.dtype], DTYPES[dt.dtype], DTYPES[b.dtype],
    )  # fmt: skip
    return out
