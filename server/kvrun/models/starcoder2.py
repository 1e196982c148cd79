"""StarCoder 2: Llama's attention with biases and a window, layer norms, and a plain feed-forward."""

from collections.abc import Sequence

from kvrun.models.llama import attention, language_model
from kvrun.spec import Config, Head, LayerNorm, Mlp, Model, Residual, Step, architecture, linear


@architecture("Starcoder2ForCausalLM")
def starcoder2(c: Config) -> Model:
    """StarCoder 2 of any size."""
    bias, eps = c.get("use_bias", True), c.layer_norm_eps
    attend = attention(c, qkv_bias=bias, out_bias=bias, window=c.get("sliding_window"))
    mlp = Mlp(c.intermediate_size, act=c.hidden_act, up=linear("mlp.c_fc", bias=bias), down=linear("mlp.c_proj", bias=bias))

    def layer(i: int) -> Sequence[Step]:
        return [
            Residual(LayerNorm("input_layernorm", eps), attend),
            Residual(LayerNorm("post_attention_layernorm", eps), mlp),
        ]

    return language_model(c, layer, Head(LayerNorm("model.norm", eps), "lm_head", tied=c.get("tie_word_embeddings", True)))
