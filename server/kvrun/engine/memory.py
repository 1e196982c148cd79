"""How many pages and how many bytes of adapters this rank may have, by arithmetic over what its device has left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvrun.device import available_bytes
from kvrun.errors import OutOfMemory

# Shares of what is left after the weights, when nothing was asked for.
PAGES_SHARE, ADAPTERS_SHARE = 0.5, 0.1

# Pages of a model that keeps nothing in them cost nothing; they only bound the tokens that a router plans for.
FREE_PAGES = 1 << 20


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes for pages and slots and for adapters on this rank; 0 = a share of what is free, divided among the ranks that share it."""

    kv_cache_bytes: int = 0
    adapter_bytes: int = 0
    ranks: int = 1
    free: Callable[[], int] = available_bytes  # bytes, where the model lies

    def pages(self, asked: int, page_bytes: int, useful: int, slots: int = 0, slot_bytes: int = 0) -> int:
        """Pages to grant beside `slots`: what was asked for, or what the budget holds but no more than could ever be in use.

        `useful` 0 = no such limit. Raises OutOfMemory when more is asked for than the budget holds, or it holds none.
        """
        budget = self.kv_cache_bytes or int(self.free() * PAGES_SHARE / self.ranks)
        if slots * slot_bytes > budget:
            cure = f"lower --max-batch-size to {budget // slot_bytes} or less, raise --kv-cache-bytes or free memory"
            raise OutOfMemory(f"the states of {slots} sequences, {slot_bytes} bytes each, do not fit {budget} bytes; {cure}")
        if page_bytes == 0:
            return asked or useful or FREE_PAGES
        budget -= slots * slot_bytes
        held = budget // page_bytes
        if asked > held or held == 0:
            raise OutOfMemory(f"{asked or 1} pages of {page_bytes} bytes do not fit {budget} bytes; raise --kv-cache-bytes or free memory")
        return asked or min(held, useful or held)

    def adapters(self, asked: int) -> int:
        """Bytes that adapters may take: what was asked for, else the flag, else a share of what is free."""
        return asked or self.adapter_bytes or int(self.free() * ADAPTERS_SHARE / self.ranks)
