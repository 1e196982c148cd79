"""OLMo 3: OLMo 2 with a window on three layers of four, whose rotation is never stretched."""

from dataclasses import replace

from kvrun.models import olmo2
from kvrun.spec import Attention, Config, Model, architecture


@architecture("Olmo3ForCausalLM")
def olmo3(c: Config) -> Model:
    """OLMo 3 of any size."""
    c = c.otherwise(sliding_window=4096, rope_theta=5e5)
    return olmo2.norms_after(c, lambda i: attend(c, slides=c.slides(i, every=4)))


def attend(c: Config, *, slides: bool) -> Attention:
    """The attention of a layer that sees its window, or everything."""
    position = c.rope(c.head_dim, layers="sliding_attention" if slides else "full_attention")
    return replace(olmo2.attend(c), position=position, window=c.sliding_window if slides else None)
