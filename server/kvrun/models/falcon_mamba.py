"""Falcon Mamba: Mamba whose choices are normalised."""

from kvrun.models.mamba import recurrent, scan
from kvrun.spec import Config, Model, architecture


@architecture("FalconMambaForCausalLM")
def falcon_mamba(c: Config) -> Model:
    """Falcon Mamba of any size."""
    return recurrent(c, scan(c, select_eps=c.get("mixer_rms_eps", 1e-6)), tied=c.get("tie_word_embeddings", True))
