"""Phi 1, 1.5 and 2: one layer norm before attention and a plain feed-forward side by side, part of each head rotated, biases everywhere."""

from collections.abc import Sequence
from dataclasses import replace

from kvrun.models.llama import attention, language_model
from kvrun.spec import Attention, Config, Head, HeadNorm, LayerNorm, Mlp, Model, Residual, Step, architecture, linear


@architecture("PhiForCausalLM")
def phi(c: Config) -> Model:
    """Phi 1, 1.5 and 2."""
    c = c.otherwise(partial_rotary_factor=0.5)
    eps = c.layer_norm_eps
    mlp = Mlp(c.intermediate_size, act=c.hidden_act, up=linear("mlp.fc1", bias=True), down=linear("mlp.fc2", bias=True))

    def layer(i: int) -> Sequence[Step]:
        return [Residual(LayerNorm("input_layernorm", eps), attend(c), mlp)]

    tied = c.get("tie_word_embeddings", False)
    return language_model(c, layer, Head(LayerNorm("model.final_layernorm", eps), "lm_head", tied=tied, bias=True))


def attend(c: Config) -> Attention:
    """The attention of any layer."""
    plain = replace(attention(c, qkv_bias=True), out=linear("self_attn.dense", bias=True))
    query, key = (LayerNorm(f"self_attn.{side}_layernorm", c.layer_norm_eps) for side in "qk")
    return replace(plain, norm=HeadNorm(query, key)) if c.get("qk_layernorm", False) else plain
