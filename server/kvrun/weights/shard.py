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

    @property
    def plain(self) -> bool:
        """One number per output and input, in that order."""
        return self == Axes(0, 1)

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

    plain = False

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


WHOLE = Axes(None, None)


class Stored(Protocol):
    """What the loader must know of a weight format."""

    def of(self, module: str, role: Role, held: Collection[str]) -> Stored:
        """The format of one module, of whose tensors the checkpoint holds these suffixes."""

    def tensors(self) -> Mapping[str, Axes | Flat]:
        """The tensors of a module by suffix ("weight", "scales") with their axes; the loader cuts by them."""


def _divided(runs: Runs, per: int, index: int, module: str) -> Runs:
    for start, stop in runs:
        if start % per or stop % per:
            raise Unsupported(
                f"{module}: its format stores {per} values together, and {start} to {stop} cuts through them; use another --num-shard"
            )
    return tuple((start // per * index, stop // per * index) for start, stop in runs)
