"""CLIP's image encoder: a class token, a norm before the first layer, quick GELU."""

from kvrun.spec import (
    Config,
    GridPositions,
    Layer,
    LayerNorm,
    Mlp,
    Patches,
    PictureAttention,
    PictureEncoder,
    Residual,
    fuse,
    linear,
    stack,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def lower(c: Config, at: str, layers: int) -> PictureEncoder:
    """The first `layers` layers of the encoder whose names begin with `at`."""
    return PictureEncoder(
        Patches(
            f"{at}embeddings.patch_embedding",
            c.patch_size,
            c.hidden_size,
            GridPositions(f"{at}embeddings.position_embedding", c.image_size // c.patch_size),
            first=f"{at}embeddings.class_embedding",
        ),
        layers=blocks(c, at, layers),
        before=LayerNorm(f"{at}pre_layrnorm", c.layer_norm_eps),  # as checkpoints spell it
    )


def blocks(c: Config, at: str, layers: int) -> tuple[Layer, ...]:
    """Pre-norm layers of attention and a plain feed-forward part, all with biases."""
    heads = c.num_attention_heads
    attention = PictureAttention(
        heads,
        heads,
        c.hidden_size // heads,
        qkv=fuse("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", bias=True),
        out=linear("self_attn.out_proj", bias=True),
    )
    mlp = Mlp(c.intermediate_size, c.hidden_act, up=linear("mlp.fc1", bias=True), down=linear("mlp.fc2", bias=True))
    steps = [Residual(LayerNorm("layer_norm1", c.layer_norm_eps), attention), Residual(LayerNorm("layer_norm2", c.layer_norm_eps), mlp)]
    return stack(layers, at + "encoder.layers.{i}", steps)
