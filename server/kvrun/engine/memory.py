"""How many pages and how many bytes of adapters this rank may have, by arithmetic over what its device has left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvrun.device import available_bytes
from kvrun.errors import OutOfMemory

# Shares of what is left after the weights, when nothing was asked for.
PAGES_SHARE, ADAPTERS_SHARE = 0.5, 0.1

# Of what is free on a device of our own: for gaps between tensors, and for what libraries set up when first used.
SLACK = 0.03

# Pages of a model that keeps nothing in them cost nothing; they only bound the tokens that a router plans for.
FREE_PAGES = 1 << 20


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes for pages and slots and for adapters on this rank; 0 = a share of what is free, divided among the ranks that share it."""

    kv_cache_bytes: int = 0
    adapter_bytes: int = 0
    ranks: int = 1
    free: Callable[[], int] = available_bytes  # bytes, where the model lies
    free_on_host: Callable[[], int] = available_bytes

    def pages(self, asked: int, page_bytes: int, useful: int, slots: int = 0, slot_bytes: int = 0, beside: int | None = None) -> int:
        """Pages to grant beside `slots`: what was asked for, or what the budget holds but no more than could ever be in use.

        `useful` 0 = no such limit · `beside`: bytes that everything else will take, where that is known: all others are for
        pages. Raises OutOfMemory when more is asked for than the budget holds, or it holds none.
        """
        held = int(self.free() * PAGES_SHARE / self.ranks) if beside is None else self._left(beside)
        budget = self.kv_cache_bytes or held
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

    def _left(self, beside: int) -> int:
        """Bytes for pages where so many are wanted beside them."""
        left = max(0, int(self.free() * (1 - SLACK)) - beside)
        if self.kv_cache_bytes > left:
            found = f"{left} are left beside the weights and the {beside} that adapters and the largest step take"
            raise OutOfMemory(f"--kv-cache-bytes {self.kv_cache_bytes} does not fit: {found}; lower it, or --max-batch-prefill-tokens")
        return left

    def adapters(self, asked: int, on_host: bool = False) -> int:
        """Bytes that adapters may take: what was asked for, else the flag, else a share of what is free where they wait."""
        free = self.free_on_host if on_host else self.free
        return asked or self.adapter_bytes or int(free() * ADAPTERS_SHARE / self.ranks)
