"""A linear layer as this rank holds it. What it multiplies with is a weight format's business, what an adapter adds is
the adapter table's; this file only joins the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvrun_kernels.ops import LoraPointers, LoraSites
from torch import Tensor

from kvrun.quant.format import QuantizedLinear
from kvrun.weights.plan import Alias


@dataclass(frozen=True)
class Source:
    """One checkpoint module that feeds a linear, as cut for this rank.

    Output row `rows[j]` of the module is column `column + j` of the linear's output; `cols` are the input columns that
    this rank multiplies with. The same cut holds for the module's weight, its bias, and an adapter's B rows and A columns.
    """

    module: str  # "model.layers.3.self_attn.q_proj"
    rows: Tensor  # int64, output rows of the whole module
    column: int
    cols: Tensor | None  # int64, input columns of the whole module; None = all
    out_features: int  # of the whole module
    in_features: int  # of the whole module
    alias: Alias | None = None  # where adapters may hold the module's change too
    flipped: bool = False  # an adapter's A has this linear's outputs and B its inputs
    also: str = ""  # another name by which adapters know the module


class LinearDelta(Protocol):
    """What the adapters of one step add to a linear's output."""

    @property
    def pointed(self) -> list[tuple[int, int, LoraPointers]] | None:
        """Runs of tokens whose adapter changes linears, and where a GPU finds it; None where that is not how it is found."""

    def arrive(self) -> None:
        """Have what is computed next wait until all of these adapters are there."""

    def apply(self, site: int, x: Tensor, y: Tensor) -> None:
        """Add to y, in place, what the adapters of its rows make of x. x [T, in_features] · y [T, out_features]."""

    def embed(self, ids: Tensor, x: Tensor) -> None:
        """Add to x, in place, what the adapters of its rows change in the embeddings of ids. ids [T] · x [T, width]."""

    def apply_grouped(self, sites: LoraSites, x: Tensor, y: Tensor, tokens: Tensor, offsets: Tensor | None = None) -> None:
        """The same for rows that belong to many linears: rows offsets[g] to offsets[g + 1] to linear sites[g], or all to the only one.

        tokens [rows] int64: the token each row was made of, ascending within a linear.
        """


class Linear:
    """y = W x + b, plus the adapters' share.

    In a row-parallel linear the result is this rank's partial sum: the residual reduces it, and only rank 0 has a bias.
    """

    def __init__(
        self,
        site: int,
        role: str,
        sources: tuple[Source, ...],
        weight: QuantizedLinear,
        bias: Tensor | None,
        out_features: int,
        in_features: int,
    ) -> None:
        self.site = site  # index in LoadedModel.linears
        self.role = role  # "column", "row" or "whole"
        self.sources = sources
        self.weight = weight
        self.bias = bias
        self.out_features = out_features  # of this rank
        self.in_features = in_features  # of this rank

    def __call__(self, x: Tensor, lora: LinearDelta | None = None) -> Tensor:
        """x [T, in_features] -> [T, out_features]"""
        y = self.weight.matmul(x, self.bias)
        if lora is not None:
            lora.apply(self.site, x, y)
        return y

    def of_some(self, x: Tensor, tokens: Tensor, lora: LinearDelta | None) -> Tensor:
        """The same for some of the step's tokens, [S] int64 ascending. x [S, in_features] -> [S, out_features]"""
        y = self.weight.matmul(x, self.bias)
        if lora is not None:
            lora.apply_grouped(LoraSites((self.site,)), x, y, tokens)
        return y
