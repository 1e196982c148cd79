"""How a model sees: what an image is cut into, what reads the pictures, and how that becomes rows among those of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvrun.spec.mixers import Attention, GatedMlp, Mixer, Mlp
from kvrun.spec.norms import HeadNorm, Norm
from kvrun.spec.weights import Fused

if TYPE_CHECKING:
    from kvrun.spec.model import Layer


@dataclass(frozen=True)
class Pixels:
    """What a picture's bytes become, by channel: (byte * rescale - mean) / std, after resizing by a filter."""

    filter: int  # Pillow's number for it: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float


@dataclass(frozen=True)
class Square:
    """The image as one picture of `side` by `side` pixels, whatever its shape was."""

    side: int


@dataclass(frozen=True)
class Bounded:
    """The image as one picture of its own shape, no edge longer than `longest` and then none shorter than `shortest`."""

    shortest: int
    longest: int


@dataclass(frozen=True)
class Quarters:
    """Five pictures, each bounded alike: the image's quarters, row by row, and the image."""

    each: Bounded


@dataclass(frozen=True)
class Tiles:
    """The image as one square picture, then as the tiles of the grid that wastes least of it (LLaVA-NeXT's "anyres").

    The features of all tiles are laid together as they lay in the image, those of padding dropped again, and `newline`
    put at the end of each row of them.
    """

    side: int  # pixels of a tile
    tokens: int  # features along the side of a tile
    grids: tuple[tuple[int, int], ...]  # height and width in pixels
    newline: str  # a vector


@dataclass(frozen=True)
class PanAndScan:
    """The image as one square picture, and where it is far from square, as crops along its longer edge after that, each such a picture.

    Their text is that of a picture each, with words between them (Gemma 3's "pan and scan").
    """

    side: int
    shortest: int  # pixels; an image of which a crop would have a shorter edge has none
    most: int  # crops of an image
    ratio: float  # of its longer edge to its shorter from which on an image has crops
    before_whole: str  # written before the image's text, where crops follow it
    before_crops: str
    between_crops: str


Cutting = Square | Bounded | Quarters | Tiles | PanAndScan


@dataclass(frozen=True)
class GridPositions:
    """A learned row for each patch of a square picture, row by row."""

    name: str
    side: int  # patches


@dataclass(frozen=True)
class FractionalPositions:
    """Learned rows of a grid of `side` by `side`; patch i of n along an edge takes the grid's coordinate floor(i / n * side).

    So pictures of any shape use the same rows (arXiv 2307.06304).
    """

    name: str
    side: int


@dataclass(frozen=True)
class Patches:
    """A picture cut into squares, each a linear of its pixels, plus where it lies."""

    name: str
    size: int  # pixels along the side of a patch
    hidden: int
    position: GridPositions | FractionalPositions
    bias: bool = False
    first: str | None = None  # a learned vector before the patches, with a row of its own before the positions


@dataclass(frozen=True)
class PictureAttention(Attention):
    """Self-attention in which every patch of a picture sees every other of the same."""


@dataclass(frozen=True)
class Perceive(Mixer):
    """Attention of latents to norm(the features of a picture) and then to themselves."""

    heads: int
    kv_heads: int
    head_dim: int
    norm: Norm  # of the features
    query: Fused
    key_value: Fused
    out: Fused
    each: HeadNorm | None = None  # of queries and keys


@dataclass(frozen=True)
class LookAt(Mixer):
    """Attention of each token to the features of the last image in its text that stands before it; of none, it gives zeros."""

    heads: int
    head_dim: int
    width: int  # of a feature
    query: Fused
    key_value: Fused
    out: Fused
    norm: HeadNorm | None = None  # of queries and keys


@dataclass(frozen=True)
class PictureEncoder:
    """after(layers(before(patches)))"""

    patches: Patches
    layers: tuple[Layer, ...]
    before: Norm | None = None
    after: Norm | None = None


@dataclass(frozen=True)
class WithoutFirst:
    """The features of the patches, without the one of what was put before them."""


@dataclass(frozen=True)
class Pool:
    """A square of features averaged down to `side` by `side`."""

    side: int


@dataclass(frozen=True)
class Normalise:
    """norm(x), of features `width` wide"""

    norm: Norm
    width: int


@dataclass(frozen=True)
class Matrix:
    """x @ weight, a tensor [width, out] stored under its own name"""

    name: str
    width: int
    out: int


@dataclass(frozen=True)
class Feed:
    """A feed-forward part from `width` to `out`."""

    part: Mlp | GatedMlp
    width: int
    out: int


@dataclass(frozen=True)
class Resample:
    """A fixed number of learned latents that look at the features through layers, and stand for them afterwards."""

    latents: str
    count: int
    width: int
    layers: tuple[Layer, ...]
    norm: Norm


Stage = WithoutFirst | Pool | Normalise | Matrix | Feed | Resample


@dataclass(frozen=True)
class Images:
    """A text takes an image's place, and the embedding's rows at its ids that are `token` become the image's features.

    The decoder never knows. `together`: a picture's features see each other in both directions. `border` begins and ends the
    text, and is written once between images beside each other. `spaces` beside an image are "kept", or "trimmed", those at
    the prompt's ends too, or "parted": one stands between a border and a word that follows it.
    """

    marker: str  # the text that stands for an image in a prompt
    text: str  # what is put there before the prompt is tokenized, `token` standing for all features of a picture
    token: int
    cutting: Cutting
    pixels: Pixels
    encoder: PictureEncoder
    stages: tuple[Stage, ...]  # from an encoder's features to a decoder's
    features: int = 0  # ids that `token` in the text becomes; 0 = that depends on an image's size
    border: str = ""
    spaces: Literal["kept", "trimmed", "parted"] = "kept"
    together: bool = False
    memory: int = 0  # features that an image has beside the sequence, for mixers that look at them; 0 = they are rows of its ids
    end_of_text: int | None = None  # behind this id no token looks at an image before it
