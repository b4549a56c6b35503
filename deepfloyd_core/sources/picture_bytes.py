"""Checks a picture file's bytes before they are decoded: its format, whether its end is missing, and what can be removed."""

from importlib.util import find_spec
from struct import pack

JPEG_START, JPEG_END, PNG_START = b"\xff\xd8\xff", b"\xff\xd9", b"\x89PNG\r\n\x1a\n"
HAS_HEIF = find_spec("pillow_heif") is not None
AVIF_BRANDS = (b"avif", b"avis")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_TEXTS, _XMP, _MAX_XMP = (b"tEXt", b"zTXt", b"iTXt"), b"XML:com.adobe.xmp\0\0", 1 << 20
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
    others.
    """
    if not data.startswith(PNG_START):
        return data
    kept, start, place = [], 0, 8
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        if kind in _TEXTS and not (data.startswith(_XMP, place + 8) and length <= _MAX_XMP):
            kept.append(data[start:place])
            start = end
        place = end
    return b"".join([*kept, data[start:]]) if kept else data


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
