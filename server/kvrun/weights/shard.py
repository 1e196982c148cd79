"""How the axes of a stored tensor follow a linear's outputs and inputs. One rule cuts every weight format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from kvrun.errors import Unsupported
from kvrun.weights.plan import Cut, Role
from kvrun.weights.split import Runs


@dataclass(frozen=True)
class Axes:
    """Which dimension of a tensor runs over outputs and which over inputs; None = over neither, so it stays whole.

    `out_per` and `inp_per` are how many outputs or inputs one index stands for: the values packed into one integer. Values
    that straddle integers come in blocks: `out_index` and `inp_index` are the indices in each, 1 where nothing straddles.
    """

    out: int | None
    inp: int | None
    out_per: int = 1
    inp_per: int = 1
    out_index: int = 1
    inp_index: int = 1

    def shape(self, out: int, inp: int, *, transposed: bool) -> tuple[int, ...] | None:
        """The shape of a tensor for so many outputs and inputs, where that is all it depends on."""
        if self != Axes(0, 1):
            return None
        return (inp, out) if transposed else (out, inp)

    def flipped(self) -> Axes:
        """The same for a tensor stored the other way round."""
        return replace(self, out=self.inp, inp=self.out, out_per=self.inp_per, inp_per=self.out_per)

    def spans(self, cut: Cut, shape: tuple[int, ...]) -> tuple[Runs, ...]:
        """The ranges of each dimension of a tensor of this shape that a cut selects.

        Raises Unsupported when a range begins or ends inside an index.
        """
        spans: list[Runs] = []
        for dim, length in enumerate(shape):
            if dim == self.out:
                spans.append(_divided(cut.rows, self.out_per, self.out_index, cut.module))
            elif dim == self.inp:
                spans.append(_divided(cut.cols, self.inp_per, self.inp_index, cut.module))
            else:
                spans.append(((0, length),))
        return tuple(spans)


@dataclass(frozen=True)
class Flat:
    """A tensor whose first dimension runs over the outputs one after another, all inputs of each together."""

    def shape(self, out: int, inp: int, *, transposed: bool) -> tuple[int, ...] | None:
        """See Axes."""
        return None

    def flipped(self) -> Flat:
        """See Axes: bytes in one row have no other way round."""
        return self

    def spans(self, cut: Cut, shape: tuple[int, ...]) -> tuple[Runs, ...]:
        """See Axes; the inputs stay whole. Raises Unsupported when outputs share an index."""
        each, rest = divmod(shape[0], cut.out_features)
        if rest:
            raise Unsupported(
                f"{cut.module}: {cut.out_features} outputs lie in {shape[0]} indices, so that some share one; this is not read"
            )
        return tuple((start * each, stop * each) for start, stop in cut.rows), *(((0, length),) for length in shape[1:])


@dataclass(frozen=True)
class Blocks:
    """Outputs by blocks of `values` inputs by the bytes of a block. A range that ends inside a block takes all of it."""

    values: int
    bytes: int

    def shape(self, out: int, inp: int, *, transposed: bool) -> tuple[int, ...] | None:
        """See Axes."""
        return (out, -(-inp // self.values), self.bytes)

    def flipped(self) -> Blocks:
        """See Axes: rows of blocks have no other way round."""
        return self

    def spans(self, cut: Cut, shape: tuple[int, ...]) -> tuple[Runs, ...]:
        """See Axes."""
        return cut.rows, tuple((start // self.values, -(-stop // self.values)) for start, stop in cut.cols), ((0, self.bytes),)

    def places(self, cut: Cut) -> Runs:
        """Where the inputs of the cut lie among those that `spans` reads, in order."""
        places, before = [], 0
        for start, stop in cut.cols:
            first, last = start // self.values, -(-stop // self.values)
            places.append((before + start - first * self.values, before + stop - first * self.values))
            before += (last - first) * self.values
        return tuple(places)


Stretch = Axes | Flat | Blocks  # how a tensor stretches over outputs and inputs
WHOLE = Axes(None, None)


class Stored(Protocol):
    """What the loader must know of a weight format."""

    def of(self, module: str, role: Role, held: Collection[str]) -> Stored:
        """The format of one module, of whose tensors the checkpoint holds these suffixes."""

    def tensors(self) -> Mapping[str, Stretch]:
        """The tensors of a module by suffix ("weight", "scales") with their axes; the loader cuts by them."""


def _divided(runs: Runs, per: int, index: int, module: str) -> Runs:
    for start, stop in runs:
        if start % per or stop % per:
            raise Unsupported(
                f"{module}: its format stores {per} values together, and {start} to {stop} cuts through them; use another --num-shard"
            )
    return tuple((start // per * index, stop // per * index) for start, stop in runs)
