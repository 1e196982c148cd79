"""Activation functions, alone and as the gate of a gated feed-forward."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kvrun_kernels.dispatch import DTYPES, Kernel, on_cpu

SCHEMA = "act_mul(Tensor gate_up, str act) -> Tensor; activation(Tensor x, str act) -> Tensor"

ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "quick_gelu": 4}

_kernel = Kernel("act_mul", "pp iii iii")


def activation_reference(x: Tensor, act: str) -> Tensor:
    wide = x.float()
    if act == "silu":
        out = functional.silu(wide)
    elif act == "gelu":
        out = functional.gelu(wide)
    elif act == "gelu_tanh":
        out = functional.gelu(wide, approximate="tanh")
    elif act == "relu":
        out = functional.relu(wide)
    else:
        out = wide * torch.sigmoid(1.702 * wide)
    return out.to(x.dtype)


def act_mul_reference(gate_up: Tensor, act: str) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (activation_reference(gate, act) * up).to(gate_up.dtype)


def activation(x: Tensor, act: str) -> Tensor:
    """Apply `act` to every element.  x [rows, width] · act one of silu, gelu, gelu_tanh, relu, quick_gelu."""
    _check(act)
    if x.dim() == 2 and (gpu := _kernel.triton(x)):
        return gpu.activate(x, x.shape[1], act, gated=False)
    if _kernel.run is None or x.dim() != 2 or not on_cpu(x):
        return activation_reference(x, act)
    return _run(_kernel.run, x, x.shape[1], ACTS[act], gated=0)


def act_mul(gate_up: Tensor, act: str) -> Tensor:
    """Multiply the second half of each row by `act` of the first.  gate_up [rows, 2 * width] -> [rows, width]."""
    _check(act)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up of equal width asked, found {gate_up.shape[-1]} columns; join the two halves first")
    if gate_up.dim() == 2 and (gpu := _kernel.triton(gate_up)):
        return gpu.activate(gate_up, gate_up.shape[1] // 2, act, gated=True)
    if _kernel.run is None or gate_up.dim() != 2 or not on_cpu(gate_up):
        return act_mul_reference(gate_up, act)
    return _run(_kernel.run, gate_up, gate_up.shape[1] // 2, ACTS[act], gated=1)


def _run(run: Callable[..., None], x: Tensor, width: int, act: int, gated: int) -> Tensor:
    out = torch.empty((x.shape[0], width), dtype=x.dtype)
    run(out.data_ptr(), x.data_ptr(), x.shape[0], width, x.stride(0), act, gated, DTYPES[x.dtype])
    return out


def _check(act: str) -> None:
    if act not in ACTS:
        raise ValueError(f"activation {act!r} asked, there are {', '.join(ACTS)}; name one of these")
