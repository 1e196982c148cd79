"""Layers whose tokens look at images before the language model's own layers do their work, as Idefics has them."""

from kvrun.models.llama import feed_forward
from kvrun.spec import Config, Gate, HeadNorm, Layer, LookAt, Residual, RmsNorm, Step, fuse, linear


def looking(c: Config, at: str, width: int) -> Layer:
    """The layer named `at`, which opens to features of `width` numbers as far as its gates let it."""
    eps, head_dim = c.rms_norm_eps, c.hidden_size // c.num_attention_heads
    one = (1,) if c.alpha_type == "float" else (1, 1, c.hidden_size)
    norm = HeadNorm(RmsNorm("cross_attn.q_layer_norm", eps), RmsNorm("cross_attn.k_layer_norm", eps))
    look = LookAt(
        c.num_attention_heads,
        head_dim,
        width,
        query=linear("cross_attn.q_proj"),
        key_value=fuse("cross_attn.k_proj", "cross_attn.v_proj"),
        out=linear("cross_attn.o_proj"),
        norm=norm if c.get("qk_layer_norms", False) else None,
    )
    steps: tuple[Step, ...] = (
        Residual(RmsNorm("input_layernorm", eps), look, after=Gate("alpha_cross_attn", one)),
        Residual(RmsNorm("post_attention_layernorm", eps), feed_forward(c), after=Gate("alpha_dense", one)),
    )
    return Layer(at, steps)
