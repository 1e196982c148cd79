"""Short causal convolution of every channel by itself, over ragged sequences that carry their last inputs along."""

import torch
from torch import Tensor
from torch.nn import functional

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu

SCHEMA = (
    "causal_conv(Tensor x, Tensor weight, Tensor? bias, Tensor query_start, Tensor slots, Tensor fresh, "
    "Tensor(a!) state, str? act=None) -> Tensor"
)

_kernel = Kernel("causal_conv", "pppp pppp iiii iii iii")


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_start: Tensor,
    slots: Tensor,
    fresh: Tensor,
    state: Tensor,
    act: str | None = None,
) -> Tensor:
    out = torch.empty_like(x)
    starts = query_start.tolist()
    for n, slot in enumerate(slots.tolist()):
        start, stop = starts[n], starts[n + 1]
        if start == stop:
            continue
        before = torch.zeros_like(state[slot]) if fresh[n] else state[slot]
        line = torch.cat((before.float(), x[start:stop].float().T), dim=-1)
        state[slot] = line[:, stop - start :].to(state.dtype)
        y = (line.unfold(-1, weight.shape[1], 1) * weight.float().unsqueeze(1)).sum(-1)
        if bias is not None:
            y = y + bias.float().unsqueeze(1)
        out[start:stop] = (functional.silu(y) if act else y).T.to(x.dtype)
    return out


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_start: Tensor,
    slots: Tensor,
    fresh: Tensor,
    state: Tensor,
    act: str | None = None,
) -> Tensor:
    """Convolve each channel with its own short filter along its sequence, and keep the last inputs for the next call.

    x [tokens, channels] · weight [channels, taps], the last tap meets the row itself · bias [channels] · query_start
    [sequences + 1] int32: sequence n owns rows query_start[n] to query_start[n + 1] · slots [sequences] int32: where its
    state lies, no two the same · fresh [sequences] bool: it begins here, whatever its slot holds · state [slots,
    channels, taps - 1], the inputs before row 0, oldest first; written in place, of a dtype that holds x exactly ·
    act: None or "silu" · out [tokens, channels], dtype of x.

    A row's result is the same to the bit however the prompt is chunked and whatever else is in the batch.
    """
    _check(x, weight, state, act)
    run = _kernel.run
    plain = weight.is_contiguous() and state.is_contiguous() and fresh.dtype == torch.bool
    if plain and (gpu := _kernel.triton(x, weight, bias)):
        return gpu.causal_conv(x, weight, bias, query_start, slots, fresh, state, act)
    native = plain and on_cpu(x, weight, state, bias)
    native = native and query_start.dtype == slots.dtype == torch.int32 and (bias is None or bias.dtype == weight.dtype)
    if run is None or not native:
        return reference(x, weight, bias, query_start, slots, fresh, state, act)
    out = torch.empty(x.shape, dtype=x.dtype)
    run(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(),
        state.data_ptr(), query_start.data_ptr(), slots.data_ptr(), fresh.data_ptr(),
        x.shape[0], slots.shape[0], state.shape[0], weight.shape[0],
        weight.shape[1], x.stride(0), act is not None,
        DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[state.dtype],
    )  # fmt: skip
    return out


def _check(x: Tensor, weight: Tensor, state: Tensor, act: str | None) -> None:
    channels, taps = weight.shape
    if act not in (None, "silu"):
        raise ValueError(f"activation {act!r} asked, there are None and 'silu'; apply others to the result")
    if x.shape[1:] != (channels,) or state.shape[1:] != (channels, taps - 1):
        raise ValueError(
            f"x [tokens, {channels}] and state [slots, {channels}, {taps - 1}] asked by the weight, found {list(x.shape)} and "
            f"{list(state.shape)}; cut the three alike"
        )
