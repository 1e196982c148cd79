"""A whole model as a value: embed, a list of layers, head. Nothing here computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvrun.spec.encoder import Encoder
from kvrun.spec.mixers import Mixer
from kvrun.spec.norms import Gate, Norm
from kvrun.spec.positions import Learned
from kvrun.spec.vision import Images
from kvrun.spec.weights import Fused


@dataclass(frozen=True, init=False)
class Residual:
    """x <- x + scale * after(the sum of mixer(norm(x)) over its mixers); a norm that is None changes nothing"""

    norm: Norm | None
    mixers: tuple[Mixer, ...]
    after: Norm | Gate | None = None
    scale: float = 1.0

    def __init__(self, norm: Norm | None, *mixers: Mixer, after: Norm | Gate | None = None, scale: float = 1.0) -> None:
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "mixers", mixers)
        object.__setattr__(self, "after", after)
        object.__setattr__(self, "scale", scale)


@dataclass(frozen=True, init=False)
class Parallel:
    """Residuals that all read the same x: x <- x + the sum of what each would add"""

    residuals: tuple[Residual, ...]

    def __init__(self, *residuals: Residual) -> None:
        object.__setattr__(self, "residuals", residuals)


@dataclass(frozen=True, init=False)
class PostNorm:
    """x <- norm(x + the sum of mixer(x) over its mixers)"""

    norm: Norm
    mixers: tuple[Mixer, ...]

    def __init__(self, norm: Norm, *mixers: Mixer) -> None:
        object.__setattr__(self, "norm", norm)
        object.__setattr__(self, "mixers", mixers)


Step = Residual | Parallel | PostNorm


@dataclass(frozen=True)
class Layer:
    """One layer; the names of its parts are relative to `at`."""

    at: str  # "model.layers.3"
    steps: tuple[Step, ...]


def stack(count: int, at: str, steps: Sequence[Step] | Callable[[int], Sequence[Step]]) -> tuple[Layer, ...]:
    """`count` layers named by `at`, whose {i} is the layer's number; `steps` may be a function of that number."""
    return tuple(Layer(at.format(i=i), tuple(steps(i) if callable(steps) else steps)) for i in range(count))


@dataclass(frozen=True)
class Rest:
    """The last rows of a vocabulary's table, where a checkpoint stores them apart."""

    name: str
    rows: int


@dataclass(frozen=True)
class Embed:
    """norm(project(table[id] * scale) + position): a table of `vocabulary` rows, `hidden` numbers out."""

    name: str
    vocabulary: int
    hidden: int
    position: Learned | None = None
    scale: float = 1.0
    norm: Norm | None = None
    project: Fused | None = None  # from the table's width to `hidden`
    width: int | None = None  # of the table; None = hidden
    rest: Rest | None = None  # of the table; None = it is stored as one


@dataclass(frozen=True)
class Head:
    """cap(weight project(norm(x)) * scale), the logits of the last hidden state.

    Tied: a checkpoint without the head's own tensor means the embedding's.
    """

    norm: Norm | None
    name: str
    tied: bool = False
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None  # logits become cap * tanh(logit / cap)
    project: Fused | None = None  # from `hidden` to the embedding table's width
    rest: Rest | None = None  # of the matrix; None = it is stored as one


@dataclass(frozen=True)
class UnitHead(Head):
    """A head whose rows are scaled to length 1 before they are used (Baichuan 2)."""


@dataclass(frozen=True)
class Decoder:
    """embed -> layers -> head"""

    embed: Embed
    layers: tuple[Layer, ...]
    head: Head
    wide: bool = False  # the sum that residuals add to is kept in float32 whatever its parts are computed in


@dataclass(frozen=True)
class Model:
    """Everything a checkpoint's config says about what to compute."""

    decoder: Decoder
    positions: int  # longest sequence; 0 = no limit of its own
    leftovers: tuple[str, ...] = ()  # regular expressions of tensors that checkpoints carry and nobody needs
    encoder: Encoder | None = None
    start: int | None = None  # the id that an answer follows where the prompt is the encoder's source
    magnitude: float = 6e4  # what hidden states may reach; a number format that ends below it is refused
    images: Images | None = None  # None: it takes text only
    spellings: tuple[tuple[str, str], ...] = ()  # beginnings of names here, and what other files have in their place


def moved(model: Model, at: str) -> Model:
    """A model of Llama's names, those that begin with "model." moved to `at`; the head stays where it is."""

    def name(old: str) -> str:
        return at + old.removeprefix("model.") if old.startswith("model.") else old

    decoder = model.decoder
    head = decoder.head
    return replace(
        model,
        decoder=replace(
            decoder,
            embed=replace(decoder.embed, name=name(decoder.embed.name)),
            layers=tuple(Layer(name(layer.at), layer.steps) for layer in decoder.layers),
            head=replace(head, norm=head.norm and replace(head.norm, name=name(head.norm.name)), name=name(head.name)),
        ),
    )
