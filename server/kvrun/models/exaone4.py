"""EXAONE 4: OLMo 2's norms after each part, each head normalised by itself, and no positions where no window is among windows."""

from dataclasses import replace

from kvrun.models.llama import attention
from kvrun.models.olmo2 import norms_after
from kvrun.spec import Attention, Config, HeadNorm, Model, RmsNorm, architecture


@architecture("Exaone4ForCausalLM")
def exaone4(c: Config) -> Model:
    """EXAONE 4: with windows (32B) or without any (1.2B)."""
    windowed = c.get("sliding_window") is not None
    return norms_after(c, lambda i: attend(c, slides=windowed and c.slides(i, every=4), windowed=windowed))


def attend(c: Config, *, slides: bool, windowed: bool) -> Attention:
    """The attention of a layer that sees its window, or everything; only a model without windows rotates the latter."""
    norm = HeadNorm(RmsNorm("self_attn.q_norm", c.rms_norm_eps), RmsNorm("self_attn.k_norm", c.rms_norm_eps))
    everywhere = replace(attention(c), norm=norm)
    if not windowed:
        return everywhere
    return replace(everywhere, window=c.sliding_window) if slides else replace(everywhere, position=None)
