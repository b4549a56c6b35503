"""Checks a picture file's bytes before they are decoded: its format, whether its end is missing, and what can be removed."""

from collections.abc import Iterator
from importlib.util import find_spec
from struct import pack
from zlib import crc32

JPEG_START, JPEG_END, PNG_START = b"\xff\xd8\xff", b"\xff\xd9", b"\x89PNG\r\n\x1a\n"
HAS_HEIF = find_spec("pillow_heif") is not None
AVIF_BRANDS = (b"avif", b"avis")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_TEXTS, _XMP, _MAX_XMP = (b"tEXt", b"zTXt", b"iTXt"), b"XML:com.adobe.xmp\0\0", 1 << 20
_EXIF, _PIXELS = b"eXIf", b"IDAT"
# Start of the file, how many bytes before it, what it is called.
_NAMED = (
    (b"\xff\x0a", 0, "JPEG XL"), (b"JXL \r\n\x87\n", 4, "JPEG XL"), (b"jP  \r\n\x87\n", 4, "JPEG 2000"),
    (b"8BPS", 0, "Photoshop"), (b"%PDF", 0, "PDF"), (b"gimp xcf", 0, "GIMP"), (b"FUJIFILMCCD-RAW", 0, "a raw file"),
    (b"ftypcrx", 4, "a raw file"), (b"<svg", 0, "SVG"), (b"<?xml", 0, "SVG or other XML"),
    (b"ftypqt", 4, "a film"), (b"ftypmp4", 4, "a film"), (b"ftypisom", 4, "a film"),
    (b"\x00\x00\x01\x00", 0, "an icon"), (b"\x76\x2f\x31\x01", 0, "OpenEXR"), (b"#?RADIANCE", 0, "Radiance HDR"),
)  # fmt: skip


def what_it_is(data: bytes) -> str:
    """A sentence about a file that no reader supports: its format, if known, and what to do."""
    if is_heif(data):
        if HAS_HEIF:
            return "HEIC of a kind that cannot be read: convert it to JPEG"
        return "HEIC: pip install 'deepfloyd-pipeline[heif]' reads it, or convert it to JPEG"
    for start, before, name in _NAMED:
        if data[before : before + len(start)] == start:
            return "a film, no picture" if name == "a film" else f"{name}: convert it to PNG or JPEG"
    return "not a picture of a known format"


def is_heif(data: bytes) -> bool:
    """Whether a file is HEIF by its first bytes."""
    return data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS


def without_text(data: bytes) -> bytes:
    """A PNG without its texts, except XMP, which may hold the orientation; programs store megabytes of their own in the
    others. EXIF and XMP that follow the pixels are put before them, so that no decode is needed to read them.
    """
    if not data.startswith(PNG_START):
        return data
    removed, late, pixels = list[tuple[int, int, bytes]](), b"", 0
    for kind, start, end in _chunks(data):
        is_xmp = kind in _TEXTS and data.startswith(_XMP, start + 8) and end - start <= _MAX_XMP + 12
        if kind == _PIXELS:
            pixels = pixels or start
        elif pixels and (is_xmp or kind == _EXIF) and end <= len(data):
            removed.append((start, end, b""))
            # Behind the pixels a decoder does not mind a wrong checksum, before them it does.
            late += data[start : end - 4] + pack(">I", crc32(data[start + 4 : end - 4]))
        elif kind in _TEXTS and not is_xmp:
            removed.append((start, end, b""))
    kept, place = [], 0
    for start, end, put in sorted([*removed, (pixels, pixels, late)] if late else removed):
        kept += [data[place:start], put]
        place = end
    return b"".join([*kept, data[place:]]) if kept else data


def ends_with_pixels(data: bytes) -> bool:
    """Whether a PNG is complete, and holds nothing but pixels, texts and a time from its first pixel on."""
    kinds = list[bytes]()
    for kind, _, end in _chunks(data):
        if kinds or kind == _PIXELS:
            kinds.append(kind)
        if kind == b"IEND":
            return end <= len(data) and set(kinds) <= {_PIXELS, *_TEXTS, b"tIME", b"IEND"}
    return False


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk of a PNG: its kind, where it starts and where it ends, which may be behind the end of the file."""
    place = 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], place, end
        place = end


def closed(data: bytes, filler: bytes = b"") -> bytes:
    """A JPEG that lacks its end mark, with that mark added; before the mark `filler`, which shows where the coded bytes
    end.
    """
    whole = data[:-1] if data.endswith(b"\xff") else data
    return b"".join([whole, filler, JPEG_END])


def fillers() -> tuple[bytes, bytes]:
    """Two fillers for `closed` that decode to different pixels wherever pixels are missing."""
    return pack(">256B", *[0x35] * 256), pack(">256B", *[0xCA, 0x11] * 128)


def is_cut(data: bytes) -> bool:
    """Whether a file that could not be read lacks its end: judged by its stated length, or by its end mark."""
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b""):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data[4:8] == b"ftyp" and data[8:12] in AVIF_BRANDS + HEIF_BRANDS:
        return _boxes_are_cut(data)
    ends = {b"\x89PNG": b"IEND", b"GIF8": b";", JPEG_START: JPEG_END}
    return any(data.startswith(start) and end not in data[-16:] for start, end in ends.items())


def _boxes_are_cut(data: bytes) -> bool:
    place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if size < 8:  # a box to the end of the file, or of 64-bit length
            return False
        place += size
    return place != len(data)
