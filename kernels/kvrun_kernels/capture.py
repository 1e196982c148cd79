"""Passes over fixed tensors on a GPU, each captured as a CUDA graph and launched again as one.

What `recording.py` is to native calls. A graph knows addresses: whoever replays it must hold every tensor that the pass read or
wrote and had not made itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvrun_kernels.recording import Uncompiled

# Ops that PyTorch marks so wait for the device: their results, or the shapes of them, depend on numbers.
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
CARRIERS = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Captures:
    """Graphs that share the memory of their intermediate results: what a pass left there is gone with the next replay of any."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function that launches again what `run` does, which is called once for it and computes nothing.

        It must have run before, so that nothing is set up on first use, and `obstacle` must have found nothing.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load adapters, may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


def obstacle(run: Callable[[], None]) -> str:
    """What of a pass no graph can hold, in words; "" if nothing. The pass is run."""
    with _Watch() as watch:
        run()
    return watch.found


class _Watch(Uncompiled):
    """Notes the first op after which the host would know something of the device's numbers, or the device read the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self.found:
            self.found = _why(func, args, made)
        return made


def _why(func: Any, args: tuple[Any, ...], made: Any) -> str:
    if WAITING & set(func.tags) and not _by_numbers(func, args):
        return f"{func} waits for the device"
    # A number without dimensions is read when an op is called, unless it is what is carried.
    places = {given.device.type for given in (*args, made) if isinstance(given, Tensor) and (given.dim() or func in CARRIERS)}
    return f"{func} carries numbers between host and device" if len(places) > 1 else ""


def _by_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is an index by numbers, whose result has a shape that is known before."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1])
