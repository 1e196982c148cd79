"""Bytes into pixels. What they claim to be is checked before anything is unpacked, since a small file can hold a huge image."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

from kvrun.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 1 << 26


def decode(data: bytes) -> Image.Image:
    """The first frame of an image file, in RGB, what is transparent on white. Raises ImageError.

    Its rotation tag is left alone: the size by which its tokens were counted is the one that the header states.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise ImageError(f"the image has {width} x {height} pixels; at most {MOST_PIXELS} are read, scale it down")
            return _rgb(opened)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"the image is none of {', '.join(FORMATS)}, or its header is broken") from error
    except Exception as error:  # decoders meet broken bytes with errors of every kind
        raise ImageError(f"the image cannot be read: {error}; send it again, or as another format") from error


def _rgb(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layered).convert("RGB")
