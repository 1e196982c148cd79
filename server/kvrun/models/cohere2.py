"""Cohere's Command R7B and Command A: Command R with a window on three layers of four, and no positions on the fourth."""

from dataclasses import replace

from kvrun.models import cohere
from kvrun.spec import Attention, Config, Model, architecture


@architecture("Cohere2ForCausalLM")
def cohere2(c: Config) -> Model:
    """Command R7B and Command A."""
    c = c.otherwise(sliding_window=4096)
    return cohere.side_by_side(c, lambda i: attend(c, slides=c.slides(i, every=4)))


def attend(c: Config, *, slides: bool) -> Attention:
    """The attention of a layer that sees its window, or of one that sees everything and knows no positions."""
    attention = cohere.attend(c)
    return replace(attention, window=c.sliding_window) if slides else replace(attention, position=None)
