"""Converts decoded pixels of any mode to sRGB, with alpha on a background, in strips of bounded memory."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

from deepfloyd_core.pictures.faults import PIXEL_ERRORS, Unreadable, too_large

STRIP_PX = 1 << 20  # pixels that are converted at once: what a conversion needs beside its result is that of a strip
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def strips(picture: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """A picture in strips of STRIP_PX pixels, each with the number of its first row."""
    rows = max(1, STRIP_PX // picture.width)
    for top in range(0, picture.height, rows):
        yield picture.crop((0, top, picture.width, min(top + rows, picture.height))), top


def convert(picture: Image.Image, profile: bytes | None, background: tuple[int, int, int]) -> Image.Image:
    """Upright sRGB of decoded pixels, strip by strip: each pixel is converted by itself. Raises Unreadable."""
    try:
        if picture.mode == "RGB" and not profile and not picture.has_transparency_data:
            return picture
        if picture.width * picture.height <= STRIP_PX:
            return _to_rgb(picture, profile, background)
        made = Image.new("RGB", picture.size)
        for strip, top in strips(picture):
            made.paste(_to_rgb(strip, profile, background), (0, top))
        return made
    except MemoryError:
        raise too_large(picture) from None
    except PIXEL_ERRORS as error:
        raise Unreadable("corrupt", f"{type(error).__name__}: {error}") from None


def _to_rgb(picture: Image.Image, profile: bytes | None, background: tuple[int, int, int]) -> Image.Image:
    if picture.mode.startswith("I"):
        picture = narrow(picture)
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    alpha = None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha, picture = picture.getchannel("A"), picture.convert("RGB")
    picture = _to_srgb(picture, profile)
    if alpha is None:
        return picture
    ground = Image.new("RGB", picture.size, background)
    return Image.composite(picture, ground, alpha)


def narrow(picture: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits. A transparent level (PNG's tRNS) is looked up before the lower bits are removed."""
    wide = np.asarray(picture).astype(np.int64)
    gray = Image.fromarray(((np.clip(wide, 0, 65535) + 128) // 257).astype(np.uint8))
    clear = picture.info.get("transparency")
    if not isinstance(clear, int):
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8))))


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    if picture.mode == "P":
        picture = picture.convert("RGB")  # its profile speaks of the palette's colours
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                picture, source, ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB",
            )  # fmt: skip
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a profile that does not fit its pixels: most viewers ignore it too
    return picture.convert("RGB")
