"""The squares of a picture as rows, each with where it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvrun.errors import ImageError

Positions = Callable[[int, int], Tensor]  # rows and columns of patches -> [rows * columns, hidden]


@dataclass(frozen=True)
class Patches:
    """linear(square) + position, after a row of its own where the encoder has one"""

    weight: Tensor  # [hidden, 3, size, size]
    bias: Tensor | None
    positions: Positions
    first: Tensor | None  # [hidden], its position in it

    def __call__(self, pictures: Tensor) -> Tensor:
        """pictures [n, 3, height, width] -> [n, rows, hidden]; pixels past the last whole square are not seen"""
        squares = functional.conv2d(pictures, self.weight, self.bias, stride=self.weight.shape[-1])
        x = squares.flatten(2).transpose(1, 2) + self.positions(*squares.shape[2:])
        return x if self.first is None else torch.cat((self.first.expand(len(x), 1, -1), x), dim=1)


@dataclass(frozen=True)
class GridPositions:
    """A row for each square of a picture of one size."""

    table: Tensor  # [side * side, hidden]
    side: int

    def __call__(self, rows: int, columns: int) -> Tensor:
        """See Positions."""
        if (rows, columns) != (self.side, self.side):
            raise ImageError(f"a picture of {rows} x {columns} patches came to an encoder for {self.side} x {self.side}")
        return self.table


@dataclass(frozen=True)
class FractionalPositions:
    """The rows of the grid's squares that lie where the picture's squares lie, each edge taken as 1."""

    table: Tensor  # [side * side, hidden]
    side: int

    def __call__(self, rows: int, columns: int) -> Tensor:
        """See Positions."""
        down, across = self._coordinates(rows), self._coordinates(columns)
        return self.table[(down[:, None] * self.side + across).flatten().to(self.table.device)]

    def _coordinates(self, count: int) -> Tensor:
        # Products and borders in single precision: where they meet exactly, rounding decides as it did in training.
        borders = torch.arange(1 / self.side, 1.0, 1 / self.side)
        at = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
        return torch.bucketize(at.clamp(max=1.0 - 1e-6), borders, right=True)
