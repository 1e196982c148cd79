"""LLaVA-NeXT 1.6: any language model, and images cut into tiles of the grid that wastes least of them."""

from collections.abc import Callable
from dataclasses import replace

from kvrun.models import clip, siglip
from kvrun.models.inner import SPELLINGS, language_model
from kvrun.spec import (
    Config,
    Feed,
    Images,
    Mlp,
    Model,
    PictureEncoder,
    Pixels,
    Tiles,
    WithoutFirst,
    architecture,
    image_processor,
    linear,
    pixels,
    special_tokens,
    token_text,
)

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_L = {**clip.DEFAULTS, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWERS: dict[str, tuple[dict, Callable[[Config, str, int], PictureEncoder]]] = {
    "clip_vision_model": ({**CLIP_L, "image_size": 336, "patch_size": 14}, clip.lower),
    "siglip_vision_model": (siglip.DEFAULTS, siglip.lower),
}


@architecture("LlavaNextForConditionalGeneration")
def llava_next(c: Config) -> Model:
    """LLaVA-NeXT over whichever language model its `text_config` describes."""
    text = language_model(c, "model.language_model.", "llama")
    return replace(
        text,
        images=_images(c, text.decoder.embed.hidden),
        leftovers=(*text.leftovers, r"vision_tower\."),  # layers above the one whose output is read
        spellings=SPELLINGS,
    )


def _images(c: Config, hidden: int) -> Images:
    tower, token = _tower(c), c.get("image_token_index", c.get("image_token_id", 32_000))
    width, bias = tower.patches.hidden, c.get("multimodal_projector_bias", True)
    project = Mlp(
        hidden,
        c.get("projector_hidden_act", "gelu"),
        up=linear("model.multi_modal_projector.linear_1", bias=bias),
        down=linear("model.multi_modal_projector.linear_2", bias=bias),
    )
    tiles = Tiles(
        tower.patches.position.side * tower.patches.size,
        tower.patches.position.side,
        tuple((height, width) for height, width in c.get("image_grid_pinpoints", GRIDS)),
        newline="model.image_newline",
    )
    return Images(
        marker=token_text(c, special_tokens(c), token),
        token=token,
        cutting=tiles,
        pixels=_pixels(c),
        encoder=tower,
        stages=(*_patches_only(tower), Feed(project, width, hidden)),
    )


def _tower(c: Config) -> PictureEncoder:
    """The image encoder up to the layer whose output is read, -2 being the last but one."""
    vision = c.within("vision_config")
    vision.only("model_type", *TOWERS)
    defaults, lower = TOWERS[vision.get("model_type", "clip_vision_model")]
    vision = vision.otherwise(**defaults)
    layer, above = c.get("vision_feature_layer", -2), vision.num_hidden_layers + 1
    c.only("vision_feature_layer", *range(-above, above))
    tower = lower(vision, "model.vision_tower.", layer % above)
    # A tile's features must be its patches, neither one more nor one less, or no grid of them can be laid.
    strategy = "full" if tower.patches.first is None else "default"
    c.otherwise(vision_feature_select_strategy="default").only("vision_feature_select_strategy", strategy)
    return tower


def _patches_only(tower: PictureEncoder) -> tuple[WithoutFirst, ...]:
    return () if tower.patches.first is None else (WithoutFirst(),)


def _pixels(c: Config) -> Pixels:
    processor = image_processor(c)
    processor.only("image_grid_pinpoints", c.get("image_grid_pinpoints", GRIDS))
    return pixels(processor, clip.MEAN, clip.STD, filter=3)
