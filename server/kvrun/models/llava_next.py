"""LLaVA-NeXT 1.6: any language model, and images cut into tiles of the grid that wastes least of them."""

from dataclasses import replace

from kvrun.models import clip
from kvrun.models.inner import SPELLINGS, language_model
from kvrun.models.towers import tower
from kvrun.spec import Config, Feed, Images, Mlp, Model, PictureEncoder, Pixels, Tiles, WithoutFirst, architecture
from kvrun.spec.companions import image_processor, pixels, special_tokens, token_text
from kvrun.spec.weights import linear

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


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
    reads, token = tower(c, "model.vision_tower."), c.get("image_token_index", c.get("image_token_id", 32_000))
    marker = token_text(c, special_tokens(c), token)
    width, bias = reads.patches.hidden, c.get("multimodal_projector_bias", True)
    project = Mlp(
        hidden,
        c.get("projector_hidden_act", "gelu"),
        up=linear("model.multi_modal_projector.linear_1", bias=bias),
        down=linear("model.multi_modal_projector.linear_2", bias=bias),
    )
    tiles = Tiles(
        reads.patches.position.side * reads.patches.size,
        reads.patches.position.side,
        tuple((height, width) for height, width in c.get("image_grid_pinpoints", GRIDS)),
        newline="model.image_newline",
    )
    return Images(
        marker=marker,
        text=marker,
        token=token,
        cutting=tiles,
        pixels=_pixels(c),
        encoder=reads,
        stages=(*_patches_only(c, reads), Feed(project, width, hidden)),
    )


def _patches_only(c: Config, reads: PictureEncoder) -> tuple[WithoutFirst, ...]:
    # A tile's features must be its patches, neither one more nor one less, or no grid of them can be laid.
    first = reads.patches.first is not None
    c.otherwise(vision_feature_select_strategy="default").only("vision_feature_select_strategy", "default" if first else "full")
    return (WithoutFirst(),) if first else ()


def _pixels(c: Config) -> Pixels:
    processor = image_processor(c)
    processor.only("image_grid_pinpoints", c.get("image_grid_pinpoints", GRIDS))
    return pixels(processor, clip.MEAN, clip.STD, filter=3)
