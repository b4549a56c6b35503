"""Decodes a file's bytes to an upright sRGB picture, or gives the reason why it cannot.

Pillow raises nine kinds of exception for hostile files, not only OSError; all of them become a named reason here.
"""

import io
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from deepfloyd_core.errors import ConfigError
from deepfloyd_core.files import read_file
from deepfloyd_core.pictures.colour import BLACK, WHITE, convert, narrow, strips
from deepfloyd_core.pictures.faults import PIXEL_ERRORS, Unreadable, too_large
from deepfloyd_core.pictures.geometry import Size
from deepfloyd_core.pictures.jpeg_scans import Layout, all_scans_are_there, without_detail
from deepfloyd_core.pictures.plain import Plain, plain
from deepfloyd_core.sources.listing import FILE_BYTES
from deepfloyd_core.sources.picture_bytes import HAS_HEIF, JPEG_START, closed, fillers, is_cut, what_it_is, without_text

# By content, not by name. What phones write as multi-picture .jpg (MPO) is opened by the JPEG plugin.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", *(["HEIF"] if HAS_HEIF else []))
MAX_PIXELS = 1 << 30  # for any memory; 292 megapixels of 3 GiB
BYTES_PER_PIXEL = 11  # Pillow's four, and as much again while it is turned or converted; 7 while it is made smaller
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_TURNED = (5, 6, 7, 8)  # these swap width and height
_FROM_RIGHT, _FROM_BOTTOM = (
    (2, 3, 6, 7),
    (3, 4, 7, 8),
)  # what was stored at the right or the bottom ends at the left or the top
_JPEGS = ("JPEG", "MPO")
GLANCE_PX = 32  # each edge of a glance's small copy
_SEEN_PX = 1024  # the longer edge of what a small copy is made of
MAX_BEND = 0.7  # levels of 255, root mean square
if HAS_HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)  # turns pictures upright itself, and says so in their EXIF
Image.init()  # `Image.open(formats=...)` raises KeyError for a plugin that is not loaded yet
# Of sizes, which are checked below before any pixel is decoded, and of damage, which the verdict is about.
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # of what is left without its texts: profiles, of printers up to some megabytes


@dataclass(frozen=True)
class Header:
    """Facts from a picture's header; `size` is upright (EXIF orientation applied)."""

    format: str
    size: Size
    mode: str  # of the pixels, as Pillow calls it
    orientation: int  # EXIF's; 1 is upright
    profile: bytes | None  # ICC
    plain: Plain | None  # upright sRGB colours as they are, of a PNG or WebP that is decoded in the fast way


@dataclass(frozen=True)
class Reduced:
    """A picture, upright and in sRGB, at a fraction of its size. It fills `box`; the pixels may reach a little beyond."""

    pixels: Image.Image
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Glance:
    """The result of one cheap decode of a picture."""

    small: Image.Image  # RGB, upright and in sRGB, GLANCE_PX each edge whatever the picture's shape
    pixels: Image.Image  # as they were decoded: of a JPEG at a fraction of its size, lying as they are stored
    orientation: int
    note: str | None  # what is odd about the file

    def digest(self) -> bytes:
        """sha256 of the upright pixels: equal for files of equal pixels, however these are packed."""
        mode = "RGBA" if self.pixels.has_transparency_data else "RGB"
        method = _UPRIGHT.get(self.orientation)
        flat = self.pixels if method is None else self.pixels.transpose(method)
        digest = sha256(f"{flat.size}".encode())
        for strip, _ in strips(flat):
            digest.update(strip.convert(mode).tobytes())
        return digest.digest()


@dataclass(frozen=True)
class _Decoded:
    """Pixels as a decoder gives them, maybe at a fraction of the picture's size."""

    pixels: Image.Image
    size: Size  # of the whole picture, lying as it is stored
    note: str | None  # what is odd about the file


def read_header(data: bytes) -> Header:
    """Read format and size without decoding. Raises Unreadable: unsupported, decompression_bomb, truncated, corrupt."""
    picture = _open(data)
    width, height = picture.size
    # Pillow has already turned the size by a TIFF's own tag; XMP may ask for it as well.
    tiff_tag = getattr(picture, "tag_v2", {}).get(_ORIENTATION)
    orientation = _orientation(picture)
    turned = orientation in _TURNED and tiff_tag not in _TURNED
    size, profile = (height, width) if turned else (width, height), picture.info.get("icc_profile")
    is_converted = picture.mode != "RGB" or profile or orientation in _UPRIGHT
    kind = None if is_converted else plain(picture)
    return Header(str(picture.format), size, picture.mode, orientation, profile, kind)


def check_fits(size: Size, memory_mib: int) -> None:
    """Raises Unreadable if a full decode, which a crop may need, would take more memory than `memory_mib`."""
    needed_mib = size[0] * size[1] * BYTES_PER_PIXEL >> 20
    if needed_mib > memory_mib:
        raise Unreadable(
            "decompression_bomb",
            f"{size[0]}x{size[1]} px take {needed_mib:,} MiB to decode, and decode_memory_mib = {memory_mib}",
        )


def check_decodes(data: bytes) -> Glance:
    """Decode at the smallest scale of the format that leaves twice GLANCE_PX, and convert a copy of GLANCE_PX.

    Raises Unreadable.
    """
    # JPEG: 1/8 to 1/1 of each edge, always every byte of the entropy code.
    decoded = _decoded(data, "RGB", (2 * GLANCE_PX, 2 * GLANCE_PX))
    profile = decoded.pixels.info.get("icc_profile")
    orientation = _orientation(decoded.pixels)
    # A mode without a meaning as sRGB is found here.
    small = convert(_small(decoded.pixels, decoded.size), profile, WHITE)
    small = small.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else small
    return Glance(small, decoded.pixels, orientation, decoded.note)


def decode_rgb(data: bytes, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Decode to an upright 8-bit sRGB picture; alpha is composited on `background`. Raises Unreadable."""
    picture = _decoded(data).pixels
    profile = picture.info.get("icc_profile")
    # Not ImageOps.exif_transpose: it writes the EXIF back, and fails on a tag that only another program would mind.
    method = _UPRIGHT.get(_orientation(picture))
    picture = picture if method is None else picture.transpose(method)  # only one of them stays in memory
    return convert(picture, profile, background)


def read_fitted(path: Path, size: tuple[int, int]) -> Image.Image:
    """A file's picture, scaled to cover `size` and cropped to it at the centre. Raises ConfigError naming the file."""
    return ImageOps.fit(_read(path), size, Image.Resampling.LANCZOS)


def _read(path: Path, background: tuple[int, int, int] = WHITE) -> Image.Image:
    try:
        return decode_rgb(read_file(path, FILE_BYTES), background)
    except (OSError, Unreadable) as error:
        raise ConfigError(f"The picture {path} cannot be read: {error}.") from None


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A file's picture, fitted as by `read_fitted`: float32 (H, W), 1 where it is lighter than middle gray, else 0. What is
    transparent is 0.
    """
    grey = np.array(ImageOps.fit(_read(path, BLACK), size, Image.Resampling.LANCZOS).convert("L"))
    return (grey > 127).astype(np.float32)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a file's picture, upright. Raises ConfigError naming the file."""
    return _read(path).size


def decode_what_is_there(data: bytes, edge_px: int) -> Image.Image:
    """A thumbnail of at most `edge_px` for people, also of a damaged picture: parts that cannot be decoded are black.

    Only for a child process with limits: it sets a switch of Pillow that every thread sees, and decodes hostile files
    on purpose. Raises Unreadable when not even the start can be decoded.
    """
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        picture = _open(data)
        profile, method = picture.info.get("icc_profile"), _UPRIGHT.get(_orientation(picture))
        picture.draft(None, (edge_px, edge_px))
        picture = load_pixels(picture, data)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
    picture = convert(picture if method is None else picture.transpose(method), profile, WHITE)
    picture.thumbnail((edge_px, edge_px))
    return picture


def decode_reduced(data: bytes, header: Header, divisor: int, layout: Layout | None) -> Reduced | None:
    """Decode a JPEG straight to 1/2, 1/4 or 1/8 of each edge: every pixel is the mean of the pixels that it replaces.

    header, layout: of these bytes; the layout lets it leave out scans that hardly show at this scale. None if means are
    not available or would not equal the picture: other formats, CMYK inks, and profiles so nonlinear that the mean of the
    colours is not the colour of the mean. Raises Unreadable.
    """
    orientation, profile, (across, down) = header.orientation, header.profile, header.size
    if header.format not in _JPEGS or header.mode not in ("L", "RGB"):
        return None
    width, height = (down, across) if orientation in _TURNED else (across, down)
    picture = _draft(data, (width // divisor, height // divisor), divisor, layout)
    if picture.size != (-(-width // divisor), -(-height // divisor)):
        return None
    picture = picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture
    pixels = convert(picture, profile, WHITE)
    if profile and divisor > 1 and _far(convert(picture.reduce(2), profile, WHITE), pixels.reduce(2)) > MAX_BEND:
        return None
    # The decoder rounds the size up, at the right and the bottom of what is stored.
    left = pixels.width - across / divisor if orientation in _FROM_RIGHT else 0.0
    top = pixels.height - down / divisor if orientation in _FROM_BOTTOM else 0.0
    return Reduced(pixels, (left, top, left + across / divisor, top + down / divisor))


def _open(data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(without_text(data)), formats=FORMATS)
    except PIXEL_ERRORS as error:
        if is_cut(data):
            raise Unreadable("truncated", "the file ends before its header does") from None
        if isinstance(error, UnidentifiedImageError):
            raise Unreadable("unsupported", what_it_is(data)) from None
        raise Unreadable("corrupt", f"{type(error).__name__}: {error}") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise Unreadable("decompression_bomb", f"{picture.width}x{picture.height} is above {MAX_PIXELS} pixels")
    return picture


def _draft(data: bytes, size: Size, divisor: int, layout: Layout | None) -> Image.Image:
    lean = without_detail(data, layout, divisor) if layout else None
    if lean:
        try:
            return _decoded(lean, None, size).pixels
        except Unreadable:
            pass  # then a decode of the whole file decides
    return _decoded(data, None, size).pixels


def _decoded(data: bytes, mode: str | None = None, size: Size | None = None) -> _Decoded:
    """Decode, a JPEG at the scale that just covers `size`. Raises Unreadable."""

    def decode(data: bytes, size: Size | None = size, note: str | None = None) -> _Decoded:
        picture = _open(data)
        whole = picture.size
        if size is not None:
            picture.draft(mode, size)
        return _Decoded(load_pixels(picture, data), whole, note)

    try:
        return decode(data)
    except Unreadable as error:
        failure = Unreadable(error.reason, str(error))  # the error itself would keep its pixels in memory
    if failure.reason != "truncated" or not data.startswith(JPEG_START):
        raise failure
    # A decoder fills what is missing without a word. What follows the last pixel's bytes changes none, so only of
    # a whole picture are pixels the same whatever follows; of coarse ones all scans must be there.
    one, other = (_pixel_digest(decode(closed(data, filler), None).pixels) for filler in fillers())
    if one != other or not all_scans_are_there(closed(data)):
        raise failure
    return decode(closed(data), note="lacks the mark of its end, and nothing else")


def _pixel_digest(picture: Image.Image) -> bytes:
    digest = sha256()
    for strip, _ in strips(picture):
        digest.update(strip.tobytes())
    return digest.digest()


def _far(one: Image.Image, two: Image.Image) -> float:
    """Root mean square difference in levels."""
    counts = np.array(ImageChops.difference(one, two).histogram(), np.float64).reshape(-1, 256).sum(0)
    return float(np.sqrt(counts @ np.arange(256.0) ** 2 / counts.sum()))


def _orientation(picture: Image.Image) -> int:
    try:
        # PNG's own method decodes all of it first, for EXIF behind the pixels: `without_text` has put it before them.
        value = Image.Image.getexif(picture).get(_ORIENTATION)
    except PIXEL_ERRORS:
        return 1  # broken EXIF, intact pixels
    return value if isinstance(value, int) else 1


def load_pixels(picture: Image.Image, data: bytes) -> Image.Image:
    """Decode an opened picture; what is known of it stays. Raises Unreadable with the reason why it cannot be decoded."""
    kind = plain(picture)
    pixels = kind.pixels(data) if kind else None
    if pixels is not None:
        decoded = Image.fromarray(pixels)
        decoded.info = picture.info
        return decoded
    try:
        picture.load()
    except MemoryError:
        raise too_large(picture) from None
    except PIXEL_ERRORS as error:
        cut = "truncated" in str(error).lower() or is_cut(data)
        raise Unreadable("truncated" if cut else "corrupt", f"{type(error).__name__}: {error}") from None
    return picture


def _small(picture: Image.Image, size: Size) -> Image.Image:
    """A square copy for the look, in a mode that keeps the profile's meaning. size: that of the complete picture;
    `picture` may be a fraction of it, rounded up.
    """
    try:
        part = max(1, round(size[0] / picture.width), round(size[1] / picture.height))
        box = (0.0, 0.0, size[0] / part, size[1] / part)
        if max(picture.size) > _SEEN_PX:
            # Of so many pixels every second tells the means as well, in a quarter of the time (5 megapixels: 5 ms).
            scale = _SEEN_PX / max(picture.size)
            seen = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            picture, box = (
                picture.resize(seen, Image.Resampling.NEAREST, box),
                (0.0, 0.0, float(seen[0]), float(seen[1])),
            )
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
        elif picture.mode.startswith("I"):
            picture = narrow(picture)
        elif picture.mode not in ("L", "RGB", "CMYK", "F"):
            picture = picture.convert("RGB")
        return picture.resize((GLANCE_PX, GLANCE_PX), Image.Resampling.BICUBIC, box, reducing_gap=2.0)
    except MemoryError:
        raise too_large(picture) from None
    except PIXEL_ERRORS as error:
        raise Unreadable("corrupt", f"{type(error).__name__}: {error}") from None
