"""Everything that this rank remembers of sequences."""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.state.pages import KvPages
from kvrun.state.slots import Slots


@dataclass(frozen=True)
class Pool:
    """Pages for what grows with a sequence, slots for what does not; a model may keep either or both."""

    kv: KvPages
    slots: Slots

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return self.kv.bytes + self.slots.bytes
