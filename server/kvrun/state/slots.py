"""The recurrent states of this rank's sequences, one slot each. Who owns which slot is the engine's business."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrun.state.shapes import SlotShape


class Slots:
    """`layers[i]` is [slots, *sizes] of the i-th array that the model's layers keep."""

    def __init__(self, shapes: Sequence[SlotShape], slots: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.slots = slots
        # Not zeroed: a sequence that begins reads nothing of its slot, and memory is taken only when a slot is first used.
        self.layers: list[Tensor] = [
            torch.empty(slots, *shape.sizes, dtype=torch.float32 if shape.wide else dtype, device=device) for shape in shapes
        ]

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


def slot_bytes(shapes: Sequence[SlotShape], item_bytes: int) -> int:
    """Bytes of one slot over all layers, in a model whose numbers take `item_bytes`."""
    return sum(shape.bytes(item_bytes) for shape in shapes)
