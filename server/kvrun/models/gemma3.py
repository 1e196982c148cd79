"""Gemma 3's text model: Gemma 2 with normalised heads for its caps; five layers with a window and a base of their own to one without."""

from dataclasses import replace

from kvrun.models import gemma2
from kvrun.models.gemma import norm
from kvrun.spec import Attention, Config, HeadNorm, Model, architecture

# Published files state only what differs from these.
UNSTATED = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}


@architecture("Gemma3ForCausalLM")
def gemma3(c: Config) -> Model:
    """Gemma 3 of any size, without its eyes."""
    c = c.otherwise(**UNSTATED)
    return gemma2.sandwich(c, lambda i: attend(c, slides=c.slides(i, every=6)))


def attend(c: Config, *, slides: bool) -> Attention:
    """The attention of a layer that sees its window, or everything."""
    return replace(
        gemma2.attend(c, slides=slides),
        position=c.rope(c.head_dim, layers="sliding_attention" if slides else "full_attention"),
        norm=HeadNorm(norm(c, "self_attn.q_norm"), norm(c, "self_attn.k_norm")),
    )
