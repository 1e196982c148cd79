"""The ranks of one shard group and the few collectives a model needs. Imports torch.distributed only when ranks are many."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvrun.errors import DeviceError


class Group:
    """This process among the `world` processes that hold one model together."""

    def __init__(self, rank: int = 0, world: int = 1, host: Any = None, device: Any = None) -> None:
        self.rank = rank
        self.world = world
        self._host = host  # carries tensors of the host, in an order of additions that no batch changes
        self._device = device  # carries those of GPUs, in the order that is fastest there; None = there are none

    @classmethod
    def single(cls) -> Group:
        """A group of one: every collective returns at once."""
        return cls()

    @classmethod
    def join(cls, rendezvous: str | Path, rank: int, world: int, place: torch.device | None = None, timeout_s: float = 120.0) -> Group:
        """Meet the other ranks at a file that all of them see and no earlier group has used.

        `place`: where this rank's model lies, None = on the host. Tensors of GPUs travel by NCCL, those of the host by gloo.

        Raises DeviceError when a rank stays away longer than `timeout_s`. Any later collective raises RuntimeError at once
        when a rank has died, and after `timeout_s` when one does not take part.
        """
        if world == 1:
            return cls.single()
        from torch.distributed import FileStore, PrefixStore, ProcessGroupGloo

        timeout = timedelta(seconds=timeout_s)
        options = ProcessGroupGloo._Options()
        options._timeout = timeout
        # Loopback by name: the default interface is the host's own, which other machines can reach.
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        try:
            store = FileStore(str(rendezvous), world)
            store.set_timeout(timeout)
            host = ProcessGroupGloo(PrefixStore("kvrun", store), rank, world, options)
            if place is None or place.type == "cpu":
                return cls(rank, world, host)
            return cls(rank, world, host, _nccl(PrefixStore("kvrun-nccl", store), rank, world, timeout))
        except RuntimeError as error:
            who = f"rank {rank} of {world} met fewer than {world} ranks at {rendezvous} within {timeout_s:g} s"
            raise DeviceError(f"{who}: {error}; start all ranks with the same fresh --rendezvous file") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place, and return it.

        On the host it gathers and adds in rank order rather than by a ring, whose order of additions depends on where in
        the tensor a row lies: a row's result must not depend on the rows beside it. On GPUs the library chooses.
        """
        if self.world == 1:
            return x
        if not x.is_cpu:
            x = x.contiguous()
            self._device.allreduce([x]).wait()
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        self._host.allgather([parts], [x.contiguous()]).wait()
        torch.add(parts[0], parts[1], out=x)
        for part in parts[2:]:
            x += part
        return x

    def gather_columns(self, x: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Lay the ranks' [T, sizes[rank]] side by side on rank 0; None elsewhere."""
        if self.world == 1:
            return x
        width = max(sizes)  # equal shapes are gathered
        mine = x.contiguous() if x.shape[1] == width else torch.nn.functional.pad(x, (0, width - x.shape[1]))
        parts = [torch.empty_like(mine) for _ in range(self.world)] if self.rank == 0 else []
        self._gather(mine, parts)
        if self.rank:
            return None
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Give every rank rank 0's x, in place, and return it."""
        if self.world > 1:
            from torch.distributed import BroadcastOptions

            options = BroadcastOptions()
            options.rootRank = 0
            options.rootTensor = 0
            self._carrier(x).broadcast([x], options).wait()
        return x

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_reduce(torch.zeros(1))

    def _gather(self, mine: Tensor, parts: list[Tensor]) -> None:
        from torch.distributed import GatherOptions

        options = GatherOptions()
        options.rootRank = 0
        self._carrier(mine).gather([parts] if parts else [], [mine], options).wait()

    def _carrier(self, x: Tensor) -> Any:
        return self._host if x.is_cpu else self._device


def _nccl(store: Any, rank: int, world: int, timeout: timedelta) -> Any:
    """NCCL between the GPUs that the ranks' threads compute on."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, world, options)
