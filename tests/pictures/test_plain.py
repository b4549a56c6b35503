"""Plain PNG and WebP files have Pillow's pixels and Pillow's verdict, with imagecodecs and without it."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from deepfloyd_core.pictures import plain
from deepfloyd_core.pictures.decode import check_decodes, check_fits, decode_rgb, read_header
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.resize import take_crops
from deepfloyd_core.sources.picture_bytes import PNG_START, without_text

# Pillow's warnings on hostile files are not errors in a run.
pytestmark = pytest.mark.filterwarnings("ignore")
TURNED = Image.Exif()
TURNED[0x0112] = 6
Chunk = tuple[bytes, bytes]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunks_of(data: bytes) -> list[Chunk]:
    found, place = [], len(PNG_START)
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        found.append((data[place + 4 : place + 8], data[place + 8 : end]))
        place = end + 4
    return found


def png_of(chunks: list[Chunk]) -> bytes:
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"".join([PNG_START, *parts])


def sixteen_bits(width: int, height: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow calls RGB as well."""
    rows = np.random.default_rng(1).integers(0, 256, (height, 1 + 6 * width), dtype=np.uint8)
    rows[:, 0] = 0
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")])


def outcome(data: bytes) -> tuple[object, ...]:
    """All that is made of a file."""
    try:
        header = read_header(data)
        check_fits(header.size, 16)
        glance, pixels = check_decodes(data), decode_rgb(data)
        crops = take_crops(data, [((max(1, header.size[0] // 3), max(1, header.size[1] // 3)), (0, 0, 1, 1))])
    except Unreadable as error:
        return (error.reason,)
    seen = glance.small.tobytes(), glance.digest(), glance.orientation, pixels.tobytes(), crops[0][0].tobytes()
    return header.format, header.size, *seen, crops[0][1]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], tuple[object, ...]]:
    """The outcome of a file where imagecodecs is not installed."""

    def alone(data: bytes) -> tuple[object, ...]:
        with monkeypatch.context() as missing:
            missing.setattr(plain, "_decoders", lambda: {})
            return outcome(data)

    return alone


def files() -> Iterator[tuple[str, bytes]]:
    for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "I;16"):
        picture = noise(90, 70).convert("L" if mode == "I;16" else mode)
        yield f"PNG {mode}", saved(Image.new("I;16", (90, 70), 900) if mode == "I;16" else picture, "PNG")
    yield "a clear colour", saved(noise(90, 70), "PNG", transparency=(1, 2, 3))
    yield "16 bits", sixteen_bits(90, 70)
    yield "a film", saved(noise(90, 70), "PNG", save_all=True, append_images=[noise(90, 70, 1)])
    for quality in (5, 80):
        yield f"WebP {quality}", saved(noise(91, 71), "WEBP", quality=quality)
    yield "WebP lossless", saved(noise(91, 71), "WEBP", lossless=True)
    yield "WebP alpha", saved(noise(91, 71).convert("RGBA"), "WEBP")
    yield "WebP film", saved(noise(91, 71), "WEBP", save_all=True, append_images=[noise(91, 71, 1)])
    for kind in ("PNG", "WEBP"):
        yield f"{kind} turned", saved(noise(90, 70), kind, exif=TURNED)
    whole = saved(noise(90, 70), "PNG")
    start, pixels, end = chunks_of(whole)
    for name, body in ((b"gAMA", b"\0\1\x86\xa0"), (b"sBIT", b"\5\5\5"), (b"sRGB", b"\0\0\0\0")):
        yield f"PNG {name.decode()}", png_of([start, (name, body), pixels, end])
    yield "something behind the pixels", png_of([start, pixels, (b"acTL", b"m"), end])
    yield "cut", whole[:-40]
    yield "no end", whole[:-12]


@pytest.mark.parametrize(("data"), [pytest.param(data, id=name) for name, data in files()])
def test_pixels_and_verdict_are_pillows(data: bytes, without: Callable[[bytes], tuple[object, ...]]) -> None:
    assert outcome(data) == without(data)


def test_only_what_is_unusual_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would compare Pillow with itself."""

    def fails(_: ImageFile.ImageFile) -> None:
        raise AssertionError("Pillow decodes")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    plainly = [data for name, data in files() if name in ("PNG RGB", "PNG L", "WebP 5", "WebP lossless", "PNG turned")]
    assert all(len(outcome(data)) > 1 for data in plainly) and len(plainly) == 5
    assert outcome(sixteen_bits(90, 70)) == ("corrupt",)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "WEBP"]), seed=st.integers(0, 9), cut=st.none() | st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), max_size=4), chunk=st.integers(-1, 2),
)  # fmt: skip
def test_the_verdict_on_a_damaged_file_is_pillows(
    kind: str, seed: int, cut: int | None, changes: list[tuple[int, int]], chunk: int
) -> None:
    """Bytes are changed in the file, or inside one chunk of a PNG, whose checksum is then right again."""
    data = saved(noise(12 + seed, 9, seed), kind)
    parts = chunks_of(data) if kind == "PNG" and chunk >= 0 else []
    body = bytearray(parts[chunk][1] if parts else data)
    for place, value in changes if body else []:
        body[place % len(body)] = value
    if parts:
        parts[chunk] = parts[chunk][0], bytes(body)
    damaged = (png_of(parts) if parts else bytes(body))[:cut]
    with pytest.MonkeyPatch.context() as missing:
        missing.setattr(plain, "_decoders", lambda: {})
        expected = outcome(damaged)
    assert outcome(damaged) == expected


@pytest.mark.parametrize("name", [b"eXIf", b"iTXt"])
@pytest.mark.parametrize("is_behind", [False, True])
def test_the_size_of_a_png_is_known_without_a_decode(name: bytes, is_behind: bool) -> None:
    """Wherever its orientation stands; so a bomb is refused by its header."""
    start, _, end = chunks_of(saved(noise(90, 70), "PNG"))
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    told = name, TURNED.tobytes()[6:] if name == b"eXIf" else xmp
    garbage = b"IDAT", b"no pixels"
    data = png_of([start, garbage, told, end] if is_behind else [start, told, garbage, end])
    assert read_header(data).size == (70, 90)
    with pytest.raises(Unreadable):
        decode_rgb(data)


def test_a_wrong_checksum_behind_the_pixels_is_no_fault() -> None:
    start, pixels, end = chunks_of(saved(noise(90, 70), "PNG"))
    late = png_of([start, pixels, (b"eXIf", TURNED.tobytes()[6:]), (b"tEXt", b"a\0b"), end])
    assert chunks_of(without_text(late))[1][0] == b"eXIf" and b"tEXt" not in without_text(late)
    assert decode_rgb(late).size == (70, 90)
    place = late.index(b"eXIf") + 12
    wrong = late[:place] + bytes([late[place] ^ 1]) + late[place + 1 :]
    assert decode_rgb(wrong).size == read_header(wrong).size == (70, 90)
    assert read_header(wrong[: place + 5]).size == (90, 70), "it is cut"
