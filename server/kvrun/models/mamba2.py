"""Mamba 2: recurrent mixers with heads, and groups of heads that choose together."""

from math import inf
from typing import Any

from kvrun.models.mamba import convolution, recurrent
from kvrun.spec import Config, Mamba2, Model, architecture, linear, packed


@architecture("Mamba2ForCausalLM")
def mamba2(c: Config) -> Model:
    """Mamba 2 of any size."""
    bias = c.get("use_bias", False)
    least, most = map(_number, c.get("time_step_limit", (0.0, inf)))
    mixer = Mamba2(
        heads=c.num_heads,
        head_dim=c.head_dim,
        groups=c.n_groups,
        size=c.state_size,
        project=packed("mixer.in_proj", bias=bias),
        conv=convolution(c),
        step_bias="mixer.dt_bias",
        decay="mixer.A_log",
        skip="mixer.D",
        norm="mixer.norm",
        eps=c.layer_norm_eps,
        out=linear("mixer.out_proj", bias=bias),
        least=least,
        most=most,
    )
    return recurrent(c, mixer, tied=c.get("tie_word_embeddings", False))


def _number(value: Any) -> float:
    """A number as JSON can say it, or as transformers writes what JSON cannot: {"__float__": "Infinity"}."""
    return float(value["__float__"]) if isinstance(value, dict) else float(value)
