"""Records the native calls of a pass over fixed tensors, and makes them again in one call: no Python runs in between.

What a CUDA graph is to kernels of a GPU. Only what ops compute natively is recorded, with the addresses of what it read and
wrote; a pass in which PyTorch computes something itself is told apart and cannot be made again.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvrun_kernels import dispatch

_INTEGERS, _FLOATS = 28, 4
_LINE = 64
HOST = torch.device("cpu")
_empty = torch.ops.aten.empty.memory_format


class _Call(ctypes.Structure):
    """runtime/replay.cpp: Call."""

    _fields_ = (("op", ctypes.c_void_p), ("integers", ctypes.c_int64 * _INTEGERS), ("floats", ctypes.c_float * _FLOATS))


class Arena:
    """Memory that recorded passes write their intermediate results to, all of them the same."""

    def __init__(self) -> None:
        self._blocks = [torch.empty(1 << 20, dtype=torch.uint8)]
        self._block = self._used = 0

    def reset(self) -> None:
        """Let what was taken be taken again: nothing of it may be read any more."""
        self._block = self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without content, which stays where it is for as long as the arena lives."""
        size = math.prod(shape) * dtype.itemsize
        while self._used + size > len(self._blocks[self._block]):
            self._block, self._used = self._block + 1, 0
            if self._block == len(self._blocks):
                self._blocks.append(torch.empty(max(size, 2 * len(self._blocks[-1])), dtype=torch.uint8))
        first, self._used = self._used, self._used + -(-size // _LINE) * _LINE
        return self._blocks[self._block][first : first + size].view(dtype).view(*shape)


class Uncompiled(TorchDispatchMode):
    """A mode that sees ops of which none is compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to skip the compiler PyTorch would first import it, which takes seconds of whatever comes first."""
        return False


class Recording(Uncompiled):
    """Within `with`: notes every native call that this thread makes, and gives ops their results' memory from an arena.

    The pass runs as it would without. Whoever replays it must hold every tensor that it read or wrote, and the arena.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.whole = can_replay()  # whether everything that the pass computed is recorded
        self._arena, self._calls, self._thread = arena, list[_Call](), threading.get_ident()
        self._table: Any = None

    def __enter__(self) -> "Recording":
        self._native = [(kernel, kernel.run) for kernel in dispatch._kernels.values() if kernel.run is not None]
        for kernel, run in self._native:
            kernel.run = self._noting(run)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for kernel, run in self._native:
            kernel.run = run
        self._table = (_Call * len(self._calls))(*self._calls)
        self._calls = []

    def __torch_dispatch__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is _empty and (device is None or device.type == "cpu"):
            return self._arena.take(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        made = func(*args, **kwargs)
        # Views compute nothing; anything else would be missing from what is replayed. A reshape may be either.
        writes = any(result.alias_info is None or result.alias_info.is_write for result in func._schema.returns)
        read = {_memory(given) for given in args if isinstance(given, Tensor)}
        results = made if isinstance(made, list | tuple) else (made,)
        self.whole &= not writes and all(_memory(result) in read for result in results if isinstance(result, Tensor))
        return made

    def replay(self) -> None:
        """Make the calls again, over what now lies where the pass found its tensors."""
        assert dispatch._library is not None and self.whole, "only what is native as a whole can be replayed"
        dispatch._library.kvrun_replay(self._table, ctypes.c_int64(len(self._table)))

    def _noting(self, function: Any) -> Callable[..., None]:
        address, types = ctypes.cast(function, ctypes.c_void_p).value, function.argtypes

        def run(*given: Any) -> None:
            function(*given)
            if threading.get_ident() != self._thread:
                return
            call, integers, floats = _Call(op=address), 0, 0
            for kind, value in zip(types, given, strict=True):
                if kind is ctypes.c_float:
                    call.floats[floats], floats = value, floats + 1
                else:
                    call.integers[integers], integers = value or 0, integers + 1
            self._calls.append(call)

        return run


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def can_replay(place: torch.device = HOST) -> bool:
    """Whether native code serves there, and knows how to make calls again on this processor and system."""
    return place.type == "cpu" and dispatch._chosen is not None and hasattr(dispatch._library, "kvrun_replay")
