"""How the axes of a stored tensor follow a linear's outputs and inputs. One rule cuts every weight format."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvrun.errors import Unsupported
from kvrun.weights.plan import Cut
from kvrun.weights.split import Runs


@dataclass(frozen=True)
class Axes:
    """Which dimension of a tensor runs over outputs and which over inputs; None = over neither, so it stays whole.

    `out_per` and `inp_per` are how many outputs or inputs one index stands for: the values packed into one integer, or the
    inputs that share a scale.
    """

    out: int | None
    inp: int | None
    out_per: int = 1
    inp_per: int = 1

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
                spans.append(_divided(cut.rows, self.out_per, cut.module))
            elif dim == self.inp:
                spans.append(_divided(cut.cols, self.inp_per, cut.module))
            else:
                spans.append(((0, length),))
        return tuple(spans)


def _divided(runs: Runs, per: int, module: str) -> Runs:
    for start, stop in runs:
        if start % per or stop % per:
            raise Unsupported(
                f"{module}: its format stores {per} values together, and {start} to {stop} cuts through them; use another --num-shard"
            )
    return tuple((start // per, stop // per) for start, stop in runs)
