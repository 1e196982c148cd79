"""Gemma: Llama's shape with norms whose weights count from one, an embedding scaled by its width, and a tied head."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvrun.models.llama import attention, feed_forward, language_model
from kvrun.spec import Config, GatedMlp, Head, Model, Residual, RmsNorm, Step, architecture


@architecture("GemmaForCausalLM")
def gemma(c: Config) -> Model:
    """Gemma 1 of any size."""
    c.only("use_bidirectional_attention", False)
    bias = c.get("attention_bias", False)

    def layer(i: int) -> Sequence[Step]:
        return [
            Residual(norm(c, "input_layernorm"), attention(c, qkv_bias=bias, out_bias=bias)),
            Residual(norm(c, "post_attention_layernorm"), feed(c)),
        ]

    return scaled(c, layer)


def norm(c: Config, name: str) -> RmsNorm:
    """A norm whose stored weights are what is added to one."""
    return RmsNorm(name, c.rms_norm_eps, offset=1.0)


def feed(c: Config) -> GatedMlp:
    """The feed-forward part; the first configs say gelu and mean its tanh form, which the models were trained with."""
    act = c.hidden_act
    return replace(feed_forward(c), act="gelu_pytorch_tanh" if act == "gelu" else act)


def scaled(c: Config, layer: Callable[[int], Sequence[Step]]) -> Model:
    """Layers between Gemma's two ends."""
    tied, softcap = c.get("tie_word_embeddings", True), c.get("final_logit_softcapping")
    return language_model(c, layer, Head(norm(c, "model.norm"), "lm_head", tied=tied, softcap=softcap), embedding_scale=c.hidden_size**0.5)
