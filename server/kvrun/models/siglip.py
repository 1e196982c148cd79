"""SigLIP's image encoder: CLIP's layers without a class token or a norm before them, with one after the last."""

from kvrun.models.clip import blocks
from kvrun.spec import Config, FractionalPositions, GridPositions, LayerNorm, Patches, PictureEncoder

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
Positions = type[GridPositions] | type[FractionalPositions]


def encoder(c: Config, at: str, positions: Positions = GridPositions) -> PictureEncoder:
    """The whole encoder whose names begin with `at`."""
    after = LayerNorm(f"{at}post_layernorm", c.layer_norm_eps)
    return PictureEncoder(_patches(c, at, positions), blocks(c, at, c.num_hidden_layers), after=after)


def lower(c: Config, at: str, layers: int) -> PictureEncoder:
    """Its first `layers` layers only."""
    return PictureEncoder(_patches(c, at, GridPositions), blocks(c, at, layers))


def _patches(c: Config, at: str, positions: Positions) -> Patches:
    learned = positions(f"{at}embeddings.position_embedding", c.image_size // c.patch_size)
    return Patches(f"{at}embeddings.patch_embedding", c.patch_size, c.hidden_size, learned, bias=True)
