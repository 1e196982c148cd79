"""A device that is not there: tensors that say they lie on a GPU and are computed on the host, and may not be mixed with the host's.

It shows without a GPU what a GPU would: a tensor that was left on the host stops the op that meets it, native code refuses
what does not lie on the host, and the ops' Triton code serves, through Triton's interpreter. It shows no speed; of order in time
it shows what `streams.py` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any
from unittest.mock import patch

import graphs
import pytest
import side_streams
import streams
import torch
from kvrun.device import Cuda
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

HERE = torch.device("cpu")
HERE_ONLY = torch.empty(0)  # stands for what a copy is still to make on the host, in memory that is not pinned
# What carries numbers from one device to another, and so may meet tensors of both.
CARRIERS = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
GIB = 1 << 30


class Mixed(RuntimeError):
    """An op or a kernel met tensors of two devices."""


class Elsewhere(Tensor):
    """A tensor of the device; `held` has its numbers on the host."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> Elsewhere:
        found = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=place
        )
        found.held = held
        graphs.METER.note(held)
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is Tensor.numpy:
            raise TypeError("can't convert cuda device type tensor to numpy")
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            return func(args[0].held)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held})"


class _Device(TorchDispatchMode):
    """Also has what is made from nothing made there, where it is asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten.to.device:  # what inference leaves whole
        func, args, kwargs = torch.ops.aten._to_copy.default, args[:1], {"device": args[1], "dtype": args[2]}
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    # Numbers without dimensions are read on the host, as PyTorch allows them to be.
    left = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
    if there and left and func not in CARRIERS:
        raise Mixed(f"{func} met tensors of the device and of the host, {[list(t.shape) for t in left]}")
    place, pinned = there[0].device if there else HERE, kwargs.get("pin_memory")
    if kwargs.get("device") is not None:
        place, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": HERE, "pin_memory": False}
    elif func is torch.ops.aten.copy_.default:
        place = args[0].device
    # In inference mode `to` comes here as it was called.
    carries = func in CARRIERS or func.overloadpacket is torch.ops.aten.to
    crosses = carries and len({place.type, *(tensor.device.type for tensor in tensors)}) > 1
    graphs.check(func, args, crosses)
    if crosses or there:
        met = next((tensor for tensor in tensors if not isinstance(tensor, Elsewhere)), None) if crosses else None
        later = streams.note(func, args, kwargs, HERE_ONLY if crosses and met is None else met)
        if crosses and later and func is torch.ops.aten.copy_.default and place.type == "cpu":
            streams.current().copy(args[0], args[1].held)
            return args[0]
    known = {id(tensor.held): tensor for tensor in there}
    graphs.METER.know(tensor.held for tensor in there)
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    if func is torch.ops.aten._to_copy.default:
        kwargs.pop("pin_memory", None)
    if (side := side_streams.active()) is not None:
        assert func is torch.ops.aten.copy_.default, f"{func} was given to a stream of copies"
        side.give(partial(func, *args, **kwargs))
        return known[id(args[0])]
    made = func(*args, **kwargs)
    if place.type == "cpu":
        if pinned:
            streams.pin(made)
        return made
    if (graph := graphs.active()) is not None:
        graph.op(func, args, kwargs, set(known), made)
    return tree_map_only(Tensor, lambda tensor: known[id(tensor)] if id(tensor) in known else Elsewhere(tensor, place), made)


def _launched(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """A kernel's run, on a GPU: it reads whatever addresses it is given, so none may be the host's."""
    left = [list(arg.shape) for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor) and not isinstance(arg, Elsewhere)]
    if left:
        raise Mixed(f"{self.fn.__name__} was given the host's tensors {left}")
    LAUNCHES.append(self.fn.__name__)
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))

    def launch(*args: Any, **kwargs: Any) -> None:
        from triton.runtime.interpreter import GridExecutor

        with ONE_AT_A_TIME, torch._C._DisableTorchDispatch():
            GridExecutor(self.rewrite(), self.arg_names, grid, self.pre_run_hooks)(*args, **kwargs)

    launch(*args, **kwargs)
    if (graph := graphs.active()) is not None:
        graph.note(launch, args, kwargs, {id(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)})


LAUNCHES: list[str] = []  # names of the kernels that ran
ONE_AT_A_TIME = Lock()  # the interpreter changes Triton's language while a kernel runs


def interpreting() -> bool:
    """Whether Triton's interpreter is on, as conftest.py decides."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def need(kind: str) -> None:
    """Skip the test where this machine lacks what it runs on: a GPU for "cuda", Triton's interpreter for the "stand-in"."""
    if kind == "cuda" and (interpreting() or not torch.cuda.is_available()):
        pytest.skip("a CUDA device and Triton's compiler (TRITON_INTERPRET unset): not here")
    if kind == "stand-in" and not interpreting():
        pytest.skip("Triton's interpreter: not on, set TRITON_INTERPRET=1")


@contextmanager
def gpus(
    count: int = 1, capability: tuple[int, int] = (9, 0), free: int = 20 * GIB, total: int = 24 * GIB, measured: bool = False
) -> Iterator[None]:
    """So many GPUs, as PyTorch says what there is; each thread that is to compute on one says so by `computing` or `settle`.

    measured: whether pages are what the largest step leaves, which takes half a minute to compute here, or a share of what is free
    """
    from triton.runtime.interpreter import InterpretedFunction

    LAUNCHES.clear()
    said = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "get_device_capability": lambda index: capability,
        "get_device_name": lambda index: "a GPU that is not there",
        "mem_get_info": lambda index: (free, total),
        "memory_reserved": lambda index: 0,
        "set_device": lambda index: None,
        "set_per_process_memory_fraction": lambda fraction, index: None,
        "_lazy_init": lambda: None,
        **graphs.SAID,
        **side_streams.SAID,
    }
    told = nullcontext() if measured else patch.object(Cuda, "peak_bytes", lambda self, run: None)
    with patch.multiple(torch.cuda, **said), patch.object(InterpretedFunction, "run", _launched), told:
        yield


def settle() -> _Device:
    """Let this thread's tensors lie on the device until it ends, or the mode is left."""
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # what is made of Python numbers is made on the host and carried
    mode = _Device()
    mode.__enter__()
    return mode


@contextmanager
def computing() -> Iterator[None]:
    """Let this thread's tensors lie on the device."""
    before = torch._C._only_lift_cpu_tensors()
    mode = settle()
    try:
        yield
    finally:
        mode.__exit__(None, None, None)
        torch._C._set_only_lift_cpu_tensors(before)
