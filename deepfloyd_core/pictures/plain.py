"""Decodes plain PNG and WebP files to the very pixels that Pillow gives, 1.4 to 1.6 times as fast, with imagecodecs.

Its libpng inflates with zlib-ng, and its libwebp writes no alpha that is not there. What is unusual or damaged is left
to Pillow, whose word on a file is the one that counts. So is everything when imagecodecs is not installed.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.sources.picture_bytes import ends_with_pixels, is_cut, without_text

_STRIP_PX = 1 << 16  # pixels that are reduced at once: they stay in the processor's cache


@cache
def _decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """By the format's name. They raise RuntimeError for what they cannot decode."""
    try:
        import imagecodecs
    except ImportError:
        return {}
    logging.getLogger("imagecodecs").setLevel(logging.ERROR)  # what it warns of is read in spite of it, as by Pillow
    return {"PNG": imagecodecs.png_decode, "WEBP": imagecodecs.webp_decode}


@dataclass(frozen=True)
class Plain:
    """A PNG or WebP by its header: gray or RGB, one picture, without transparency."""

    format: str
    size: Size  # as it is stored
    is_gray: bool

    def pixels(self, data: bytes) -> np.ndarray | None:
        """uint8 (H, W, 3), of a gray one (H, W). None: more than 8 bits, damaged, or too large for the memory."""
        data = without_text(data)
        if is_cut(data) or (self.format == "PNG" and not ends_with_pixels(data)):
            return None
        try:
            pixels = _decoders()[self.format](data)
        except (RuntimeError, ValueError, MemoryError):
            return None
        shape = (*self.size[::-1], *(() if self.is_gray else (3,)))
        return pixels if pixels.dtype == np.uint8 and pixels.shape == shape else None


def plain(picture: Image.Image) -> Plain | None:
    """What an opened picture is, if it can be decoded here."""
    if picture.format not in _decoders() or picture.mode not in ("L", "RGB") or picture.has_transparency_data:
        return None
    return None if getattr(picture, "is_animated", False) else Plain(picture.format, picture.size, picture.mode == "L")


def reduced_plain(pixels: np.ndarray, divisor: int) -> Image.Image:
    """Means of divisor x divisor pixels, as Pillow's `reduce`: uint8 (H, W, 3) -> ceil(W / divisor) x ceil(H / divisor)."""
    height, width = pixels.shape[:2]
    rows = max(1, _STRIP_PX // width // divisor) * divisor
    means = Image.new("RGB", (-(-width // divisor), -(-height // divisor)))
    for top in range(0, height, rows):
        means.paste(Image.fromarray(pixels[top : top + rows]).reduce(divisor), (0, top // divisor))
    return means
