"""How a checkpoint stores the matrices of one linear. Says names and order only; cutting them is `weights/`'s work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar


@dataclass(frozen=True)
class Fused:
    """A linear whose parts are checkpoint modules of their own, laid below each other here."""

    names: tuple[str, ...]
    bias: bool = False
    transposed: bool = False  # stored [in, out] instead of [out, in]
    parts: tuple[int, ...] = ()  # how many of the linear's parts each module holds; () = one


@dataclass(frozen=True)
class Packed:
    """A linear whose parts already lie in one checkpoint module.

    Order "parts": all of the first part, then all of the second. Order "per_group": for each key/value head its query
    heads, then its key, then its value; with as many key/value heads as query heads that is one (q, k, v) per head.
    """

    name: str
    order: Literal["parts", "per_group"] = "parts"
    bias: bool = False
    transposed: bool = False


Stored = Fused | Packed
S = TypeVar("S", Fused, Packed)


def linear(name: str, *, bias: bool = False) -> Fused:
    """A linear of one checkpoint module."""
    return Fused((name,), bias)


def fuse(*names: str, bias: bool = False, parts: tuple[int, ...] = ()) -> Fused:
    """Several checkpoint modules that read the same input, multiplied as one."""
    return Fused(names, bias, parts=parts)


def packed(name: str, order: Literal["parts", "per_group"] = "parts", *, bias: bool = False) -> Packed:
    """One checkpoint module that holds several parts in this order."""
    return Packed(name, order, bias)


def transposed(stored: S) -> S:
    """The same, stored [in, out]."""
    return replace(stored, transposed=True)
