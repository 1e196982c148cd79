"""Bytes become the very pixels that transformers' processors make of them, whatever file they come in."""

from io import BytesIO

import numpy as np
import pytest
from kvrun.errors import ImageError
from kvrun.spec import Bounded, PanAndScan, Pixels, Quarters, Square, Tiles
from kvrun.vision.crops import crops
from kvrun.vision.cut import cut, pictures
from kvrun.vision.decode import decode
from kvrun.vision.largest import blank, largest
from kvrun.vision.tiles import Size, best_grid, fitted, margins
from pictures import picture
from PIL import Image

MODES = [("RGB", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG")]
MODES += [("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF")]


@pytest.mark.parametrize(("mode", "kind"), MODES)
def test_a_file_of_any_kind_becomes_the_same_colours(mode, kind):
    from transformers.image_transforms import convert_to_rgb

    data = picture(19, 13, seed=1, mode=mode, kind=kind)
    reference = convert_to_rgb(Image.open(BytesIO(data)), return_numpy=True)
    assert np.array_equal(np.asarray(decode(data)), reference)


def test_what_a_palette_calls_transparent_is_white():
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    data = BytesIO()
    image.save(data, "PNG", transparency=0)
    seen = decode(data.getvalue())
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 1))) == ((255, 255, 255), (200, 100, 50))


def test_a_moving_image_shows_its_first_frame():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    data = BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    assert decode(data.getvalue()).getpixel((2, 2))[0] > 150


def test_a_rotation_tag_changes_nothing_for_tokens_were_counted_without_it():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = BytesIO()
    Image.new("RGB", (20, 10)).save(data, "JPEG", exif=exif)
    assert decode(data.getvalue()).size == (20, 10)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO"])
def test_other_kinds_of_files_are_refused(kind):
    with pytest.raises(ImageError, match="none of PNG, JPEG, WEBP, GIF"):
        decode(picture(16, 16, kind=kind))


@pytest.mark.parametrize("size", [(30, 20), (200, 9), (9, 200), (1, 1), (27, 27), (28, 90)])
def test_edges_are_bounded_as_transformers_bounds_them(size):
    from transformers.image_utils import SizeDict
    from transformers.models.idefics2.image_processing_pil_idefics2 import get_resize_output_image_size

    (picture_,) = cut(Bounded(9, 27), Image.new("RGB", size), 2)
    height, width = get_resize_output_image_size(np.zeros((3, size[1], size[0])), SizeDict(shortest_edge=9, longest_edge=27))
    assert picture_.size == (width, height)


def test_quarters_come_row_by_row_and_the_whole_last():
    image = Image.new("RGB", (5, 3))
    image.putpixel((4, 2), (255, 255, 255))
    sizes = [part.size for part in cut(Quarters(Bounded(1, 9)), image, 0)]
    assert sizes == [(2, 1), (3, 1), (2, 2), (3, 2), (5, 3)]
    assert cut(Quarters(Bounded(1, 9)), image, 0)[3].getpixel((2, 1)) == (255, 255, 255)


def test_an_image_without_quarters_is_refused():
    with pytest.raises(ImageError, match="1 x 7 pixels has no quarters"):
        cut(Quarters(Bounded(1, 9)), Image.new("RGB", (1, 7)), 0)


FAR_FROM_SQUARE = [(61, 17), (17, 61), (23, 40), (24, 20), (20, 24), (9, 30), (15, 8), (16, 8), (200, 31)]


@pytest.mark.parametrize("size", [*FAR_FROM_SQUARE, (25, 22), (7, 30), (70, 1)])
def test_crops_are_those_of_transformers(size):
    from transformers import Gemma3ImageProcessorPil

    width, height = size
    image = np.arange(3 * height * width).reshape(3, height, width)
    theirs = Gemma3ImageProcessorPil().pan_and_scan(image, 8, 4, 1.2)
    ours = crops(PanAndScan(8, 8, 4, 1.2, "", "", ""), Size(height, width))
    assert len(ours) == len(theirs)
    for (left, top, right, bottom), reference in zip(ours, theirs, strict=True):
        assert np.array_equal(image[:, top:bottom, left:right], reference)


def test_crops_come_behind_the_whole():
    image = Image.new("RGB", (16, 4))
    image.paste((255, 0, 0), (8, 0, 12, 4))
    parts = cut(PanAndScan(4, 4, 4, 1.2, "", "", ""), image, 0)
    assert [part.size for part in parts] == [(4, 4)] * 5
    assert [part.getpixel((1, 1))[0] for part in parts[1:]] == [0, 0, 255, 0]


def test_tiles_come_row_by_row_behind_the_whole():
    tiles = Tiles(4, 1, ((4, 8), (8, 4), (8, 8)), "newline")
    image = Image.new("RGB", (8, 8))
    image.putpixel((7, 1), (255, 0, 0))
    parts = cut(tiles, image, 0)
    assert [part.size for part in parts] == [(4, 4)] * 5
    assert parts[2].getpixel((3, 1)) == (255, 0, 0)


def test_numbers_are_scaled_and_centred_by_channel():
    pixels = Pixels(2, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0), 1 / 255)
    (numbers,) = pictures(Image.new("RGB", (6, 6), (255, 0, 51)), Square(2), pixels)
    assert numbers.shape == (3, 2, 2) and numbers.dtype == np.float32
    assert np.allclose(numbers[:, 0, 0], [1.0, -1.0, 0.2])


def test_a_grid_is_chosen_fitted_and_cleared_of_padding():
    image = Size(400, 1200)
    assert best_grid(image, ((336, 672), (672, 336), (336, 1008))) == (336, 1008)
    assert fitted(image, Size(336, 1008)) == (336, 1008)
    assert fitted(Size(100, 250), Size(336, 1008)) == (336, 840)
    assert margins(Size(100, 250), Size(24, 72)) == (0, 6)
    assert margins(Size(10, 40), Size(24, 72)) == (3, 0)


GRIDS = ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))
CUTTINGS = (
    Square(16),
    Bounded(10, 24),
    Quarters(Bounded(10, 24)),
    Tiles(16, 4, GRIDS, "newline"),
    PanAndScan(16, 8, 3, 1.2, "", "", ""),
    PanAndScan(16, 8, 2, 3.5, "", "", ""),
)


@pytest.mark.parametrize("cutting", CUTTINGS, ids=str)
def test_no_image_becomes_more_pictures_or_larger_ones_than_the_largest(cutting):
    def worth(size: Size) -> tuple[int, int]:
        seen = cut(cutting, Image.new("RGB", (size.width, size.height)), Image.Resampling.NEAREST)
        return len(seen), sum(picture.width * picture.height for picture in seen)

    most = worth(largest(cutting))
    for size in (Size(height, width) for height in range(2, 80, 3) for width in range(2, 80, 3)):
        assert all(np.less_equal(worth(size), most)), size
    assert decode(blank(largest(cutting))).size == largest(cutting)[::-1]
