"""Decoding: upright, sRGB, alpha on white, whatever the format; a hostile file is a reason and never another error."""

import base64
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from PIL.JpegImagePlugin import JpegImageFile

from deepfloyd_core.pictures.decode import check_decodes, decode_rgb, read_header
from deepfloyd_core.pictures.faults import Unreadable

# Pillow's warnings on hostile files are not errors in a run.
pytestmark = pytest.mark.filterwarnings("ignore")


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int = 48, height: int = 32) -> Image.Image:
    """A picture that survives lossy formats, and that no turn or flip leaves as it is."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray(np.rint(np.stack([40 + 180 * x, 40 + 180 * y, 60 + 60 * x * y], -1)).astype(np.uint8))


def far(picture: Image.Image, expected: Image.Image | np.ndarray) -> int:
    """Largest difference of any channel of any pixel."""
    assert picture.mode == "RGB"
    return int(np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int)).max())


def reason(data: bytes) -> str | None:
    """The ledger's word for a file, or None: the steps that the index takes."""
    try:
        read_header(data)
        check_decodes(data)
    except Unreadable as error:
        assert str(error), "every reason has a detail"
        return error.reason
    return None


# ---- orientation ------------------------------------------------------------------------------------------------------

# How an upright picture is stored so that a viewer who obeys the tag shows it upright again (EXIF 2.32, 4.6.4 A).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
LOSSY = {"JPEG": {"quality": 98, "subsampling": 0}, "AVIF": {"quality": 98}}


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
@pytest.mark.parametrize("orientation", STORED)
def test_all_eight_orientations_give_the_same_upright_picture_and_size(kind: str, orientation: int) -> None:
    upright = smooth()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    data = saved(stored, kind, exif=exif, **(LOSSLESS | LOSSY)[kind])
    assert read_header(data).size == upright.size
    assert read_header(data).format == kind
    picture = decode_rgb(data)
    assert picture.size == upright.size
    assert far(picture, upright) <= (0 if kind in LOSSLESS else 10)


def test_orientation_in_xmp_is_obeyed_as_well() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = saved(Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(smooth())))), "JPEG", quality=98, xmp=xmp)
    assert read_header(data).size == decode_rgb(data).size == smooth().size
    assert far(decode_rgb(data), smooth()) <= 10


def test_a_broken_tag_beside_the_orientation_does_not_leave_the_picture_lying() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    data = saved(Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(smooth())))), "JPEG", quality=98, exif=exif)
    entry = struct.pack(">HH", 0x010E, 2)
    assert data.count(entry) == 1
    data = data.replace(entry, struct.pack(">HH", 0x0100, 2))  # ImageWidth as text: readable, but not writable again
    assert read_header(data).size == decode_rgb(data).size == smooth().size
    assert far(decode_rgb(data), smooth()) <= 10


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_no_orientation(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    data = saved(smooth(), "PNG", exif=exif)
    assert read_header(data).size == smooth().size
    assert far(decode_rgb(data), smooth()) == 0


def test_exif_that_is_garbage_is_ignored() -> None:
    for garbage in (b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"):
        data = saved(smooth(), "JPEG", quality=98, exif=garbage)
        assert read_header(data).size == smooth().size
        assert reason(data) is None
        assert far(decode_rgb(data), smooth()) <= 10


# ---- alpha, palettes, gray, 16 bit, CMYK ------------------------------------------------------------------------------


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """colour (H, W, 3), alpha (H, W), both 0 to 255."""
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_white_not_dropped(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    pixels[:, :10, 3], pixels[:, 10:20, 3] = 0, 255
    data = saved(Image.fromarray(pixels), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert far(decode_rgb(data), on_white(pixels[..., :3], pixels[..., 3])) <= 1
    assert far(decode_rgb(data).crop((0, 0, 10, 20)), np.full((20, 10, 3), 255)) == 0


def test_alpha_can_be_composited_on_another_colour() -> None:
    data = saved(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG")
    assert far(decode_rgb(data, (10, 200, 30)), np.full((4, 4, 3), (10, 200, 30))) == 0


def test_gray_with_alpha_is_composited_on_white() -> None:
    gray, alpha = np.meshgrid(np.arange(0, 256, 5, dtype=np.uint8), np.arange(0, 256, 5, dtype=np.uint8))
    data = saved(Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]), "PNG")
    assert far(decode_rgb(data), on_white(np.stack([gray] * 3, -1), alpha)) <= 1


def palette_picture() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A palette picture, its indices and its colours."""
    colours = np.random.default_rng(1).integers(0, 256, (16, 3), dtype=np.uint8)
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 16
    picture = Image.fromarray(indices)
    picture.putpalette(colours.tobytes())
    assert picture.mode == "P"
    return picture, indices, colours


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_gives_its_colours(kind: str) -> None:
    picture, indices, colours = palette_picture()
    assert far(decode_rgb(saved(picture, kind)), colours[indices]) == 0


def test_a_palettes_transparency_is_white_whether_it_is_one_index_or_a_table() -> None:
    picture, indices, colours = palette_picture()
    one = colours.copy()
    one[3] = 255
    assert far(decode_rgb(saved(picture, "PNG", transparency=3)), one[indices]) == 0
    assert far(decode_rgb(saved(picture, "GIF", transparency=3)), one[indices]) == 0
    table = np.arange(0, 256, 17, dtype=np.uint8)
    data = saved(picture, "PNG", transparency=table.tobytes())
    assert far(decode_rgb(data), on_white(colours[indices], table[indices])) <= 1


def test_a_transparent_colour_of_a_png_without_alpha_is_white() -> None:
    pixels = np.full((4, 4, 3), 10, np.uint8)
    pixels[0, 0] = (1, 2, 3)
    made = decode_rgb(saved(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3)))
    pixels[0, 0] = 255
    assert far(made, pixels) == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_range(kind: str) -> None:
    wide = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    assert far(decode_rgb(saved(Image.fromarray(wide), kind)), np.stack([np.rint(wide / 257)] * 3, -1)) == 0


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG written by hand: colour type 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_transparent_level_of_a_16_bit_gray_png_is_white_and_its_neighbour_is_not() -> None:
    wide = np.array([[0, 700, 699, 65535], [257, 700, 514, 30000]], np.uint16)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in wide)
    clear = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 700)
    clear += struct.pack(">I", zlib.crc32(clear[4:]))
    expected = np.where(wide == 700, 255, np.rint(wide / 257))
    assert far(decode_rgb(png(4, 2, 16, 0, rows, clear)), np.stack([expected] * 3, -1)) == 0


def test_16_bit_colour_keeps_its_upper_eight_bits() -> None:
    wide = np.random.default_rng(2).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in wide)
    assert far(decode_rgb(png(7, 5, 16, 2, rows)), wide / 257) <= 1


def test_black_and_white_and_gray_become_rgb() -> None:
    bits = np.random.default_rng(3).integers(0, 2, (9, 11)).astype(bool)
    assert far(decode_rgb(saved(Image.fromarray(bits), "PNG")), np.stack([bits * 255] * 3, -1)) == 0
    gray = np.arange(99, dtype=np.uint8).reshape(9, 11)
    assert far(decode_rgb(saved(Image.fromarray(gray), "PNG")), np.stack([gray] * 3, -1)) == 0


def test_a_cmyk_jpeg_has_the_colours_of_its_inks() -> None:
    inks = np.zeros((16, 64, 4), np.uint8)
    inks[:, 16:32, 0], inks[:, 32:48, 1], inks[:, 48:, 3] = 255, 255, 255  # white, cyan, magenta, black
    picture = decode_rgb(saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=98))
    for left, colour in ((0, (255, 255, 255)), (16, (0, 255, 255)), (32, (255, 0, 255)), (48, (0, 0, 0))):
        assert far(picture.crop((left + 4, 4, left + 12, 12)), np.full((8, 8, 3), colour)) <= 6


# ---- ICC profiles -----------------------------------------------------------------------------------------------------

P3_TO_XYZ = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])  # D50
SRGB_TO_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])  # D50


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC v2 display profile of the given tags (ICC.1:2001-04)."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    white = fixed(0.9642, 1.0, 0.8249)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78),
            b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": b"XYZ " + bytes(4) + white, **tags}  # fmt: skip
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I", place + len(body)) + bytes(4) + b"\x02\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    head = (head + bytes(28) + white).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + table + body


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)


def display_p3_gamma_2() -> bytes:
    """Display P3's primaries with a plain gamma of 2, so that the expected colours are easily computed."""
    tags = dict[bytes, bytes]()
    for number, colour in enumerate((b"r", b"g", b"b")):
        column = struct.pack(">3i", *(round(value * 65536) for value in P3_TO_XYZ[:, number]))
        tags |= {colour + b"XYZ": b"XYZ " + bytes(4) + column, colour + b"TRC": curve(2.0)}
    return profile(b"RGB ", tags)


def srgb_of_p3(pixels: np.ndarray) -> np.ndarray:
    """uint8 P3 (gamma 2) -> sRGB 0 to 255, clipped."""
    linear = (pixels / 255) ** 2 @ P3_TO_XYZ.T @ np.linalg.inv(SRGB_TO_XYZ).T
    return encoded(np.clip(linear, 0, 1))


def encoded(linear: np.ndarray) -> np.ndarray:
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def p3_pixels() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_profile_is_converted_to_srgb(kind: str) -> None:
    pixels = p3_pixels()
    assert np.abs(srgb_of_p3(pixels) - pixels).max() > 40, "a profile that changes nothing would prove nothing"
    options = {"icc_profile": display_p3_gamma_2(), **LOSSLESS[kind]}
    assert far(decode_rgb(saved(Image.fromarray(pixels), kind, **options)), srgb_of_p3(pixels)) <= 3


def test_a_profile_holds_for_the_colours_of_a_palette_too() -> None:
    picture, indices, colours = palette_picture()
    data = saved(picture, "PNG", icc_profile=display_p3_gamma_2())
    assert far(decode_rgb(data), srgb_of_p3(colours)[indices]) <= 3


def test_a_profile_is_applied_before_alpha_is_composited() -> None:
    alpha = np.tile(np.linspace(0, 255, 50).astype(np.uint8), (40, 1))
    pixels = p3_pixels()
    data = saved(Image.fromarray(np.dstack([pixels, alpha])), "PNG", icc_profile=display_p3_gamma_2())
    assert far(decode_rgb(data), on_white(srgb_of_p3(pixels), alpha)) <= 3


def test_a_gray_profile_is_converted() -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    dark = profile(b"GRAY", {b"kTRC": curve(3.0)})
    expected = encoded((gray / 255) ** 3)
    assert np.abs(expected - gray).max() > 20
    made = decode_rgb(saved(Image.fromarray(gray), "PNG", icc_profile=dark))
    assert far(made, np.stack([expected] * 3, -1)) <= 2


@pytest.mark.parametrize("unfit", [b"not a profile", b"", profile(b"GRAY", {b"kTRC": curve(1.0)})])
def test_a_profile_that_does_not_fit_is_ignored(unfit: bytes) -> None:
    data = saved(smooth(), "PNG", icc_profile=unfit)
    assert reason(data) is None
    assert far(decode_rgb(data), smooth()) == 0


# ---- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_every_promised_format_is_read(kind: str) -> None:
    flat = Image.new("RGB", (48, 32), (200, 100, 50))
    data = saved(flat, kind)
    assert read_header(data).format == kind
    assert read_header(data).size == (48, 32)
    assert reason(data) is None
    assert far(decode_rgb(data), flat) <= 4


@pytest.mark.parametrize("options", [{"compression": name} for name in ("tiff_lzw", "tiff_deflate", "packbits")])
def test_compressed_tiffs_are_read(options: dict[str, str]) -> None:
    assert far(decode_rgb(saved(smooth(), "TIFF", **options)), smooth()) == 0


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_only_the_first_frame_of_an_animation_counts(kind: str, options: dict[str, bool]) -> None:
    red, blue = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    data = saved(red, kind, save_all=True, append_images=[blue, red], **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(data))))) == 3
    assert far(decode_rgb(data), red) == 0


def test_a_jpeg_of_several_pictures_as_phones_write_it_is_its_first_one() -> None:
    data = saved(smooth(), "MPO", save_all=True, append_images=[smooth().rotate(180)], quality=98)
    assert reason(data) is None
    assert far(decode_rgb(data), smooth()) <= 10


# 96x64, quarters of (200, 60, 40), (40, 90, 190) and below their complements; luma 4x1: Pillow cannot write that.
JPEG_411 = (
    b"c-ozjYfy|~6vxkdYp>P5+xynK%%lsVF(S8ou#ye=&@2%RlM2Nby10*C6=J6ua?hCAu_5|^RK$#_bY+^F5RyS*ixK6eZSC&+c-FXl@d5wmd^_j-&-"
    b"tAPJwY!)6BE5C8VCY_zz<LtL;*#T?!cmPFmi^WX+|lNdC1jDwOXZAsXV>38c#3QOQq8IYFHnR=XtfapU#)lX*r&An-CQ4p&13kC^%1*C-=`nHNeV"
    b"YF07%5NFZ5)VhL0a{&-J@_%8S%g2X#|$m9y83KvvrfFvl2q$&5-IJ+C?fo2(Pz?4W2A7hd%FrAy4Q+QS$G_S0dU(!Ah9G;w!t5Ev-=|+qkJ8pc)g"
    b"o)Fp&zLzYVs_MgL-c}$i(;0>En6PHVr4?g+I8zw(>83(%-XVb+x8th^Y-rBpMT(>>B!Mz$4{I*Rdm`?eD3^(l8cv0ua#F+UcXUw^VXfZ`i91)=DY"
    b"XqKX};j=<$=zr`<iTUca&S_Pu>K_(}ZyWym&c|LW!<fFgeCk6bL~B59hUWo|Bl+~zJ|X(nKbhc?nEOG@_%oSGx&<`teTt5pPrFB#yIGuoBD!PC0O"
    b"4!Y64ll>i7?thW}0{hMN6x0-fKaXNT4`NJ+r8-!Dl{8r|UU}{eMR4kcBOk#Hb8B{(&?0j+Ab6H!;Nm}~ibeO^4ZKq;6cdKbxcHCRJc5=@t~vx=ZM"
    b"}M(-bzV52tI^aOrf@Nd&}E2i%C-G+xJ**mWJA@l?bderEUcMy`s6mUnCHu3pSn6z&kpf)~pJnL7>fjHO5sPyyL|_K^%o(GlC(}-qz@C--Dp4+EEZ"
    b"<F}dDLnRBY}2vHo|Y`K*XIuOh2ttzQU=+FP0nukF2$BostG1z!Gz@^KK!^XS(duJI}PvVEio6I7E2kVFGzJ}K#uph$4iH^hA*r|~UB1-WwZXXiQg"
    b"j_yha{4sH+H-N<>_~Erc!|K-gikTq)yx?U*>WLzbO&cleBNYl<>D6`vK2ig&RXGFtm~>&Fd#@N_z-^5YbExh^~K((^BYBwh`I"
)  # fmt: skip


def test_a_jpeg_with_a_quarter_of_the_colour_is_read() -> None:
    data = zlib.decompress(base64.b85decode(JPEG_411))
    opened = Image.open(io.BytesIO(data))
    assert isinstance(opened, JpegImageFile)
    assert [layer[1:3] for layer in opened.layer] == [(4, 1), (1, 1), (1, 1)]
    expected = np.empty((64, 96, 3), np.uint8)
    expected[:, :48], expected[:, 48:] = (200, 60, 40), (40, 90, 190)
    expected[32:] = 255 - expected[32:]
    assert reason(data) is None
    assert far(decode_rgb(data), expected) <= 6


def test_progressive_jpegs_are_read() -> None:
    assert far(decode_rgb(saved(smooth(), "JPEG", progressive=True, quality=98)), smooth()) <= 10


# ---- bad files --------------------------------------------------------------------------------------------------------


def noise_picture() -> Image.Image:
    """A picture that no format packs small, so that a cut takes pixels."""
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (60, 80, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "BMP"])
def test_a_file_cut_anywhere_after_its_signature_is_truncated(kind: str) -> None:
    data = saved(noise_picture(), kind)
    assert reason(data) is None
    start = 60 if kind == "BMP" else 16  # a BMP's header says nothing that proves a cut
    # What lacks only the mark of its end is whole.
    end = len(data) - {"PNG": 24, "JPEG": 12}.get(kind, 2)
    for length in [*range(start, end, len(data) // 60), end]:
        assert reason(data[:length]) == "truncated", f"{length} of {len(data)} bytes"


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"a caption, not a picture\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", bytes(5000),
     saved(Image.new("RGB", (8, 8)), "PPM"), saved(Image.new("RGB", (8, 8)), "TGA"), saved(Image.new("L", (8, 8)), "EPS"),
     saved(Image.new("RGB", (64, 64)), "ICO"), b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic"],
    ids=["zero bytes", "newline", "text", "svg", "pdf", "zeros", "ppm", "tga", "eps", "ico", "heic"],
)  # fmt: skip
def test_what_is_no_picture_of_a_promised_format_is_unsupported(data: bytes) -> None:
    assert reason(data) == "unsupported"


def test_floating_point_pixels_are_found_by_the_index_and_not_by_the_builder() -> None:
    data = saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    assert reason(data) == "corrupt"
    with pytest.raises(Unreadable, match="no agreed range"):
        decode_rgb(data)


@pytest.mark.parametrize(
    "data",
    [png(60_000, 60_000, 8, 2), png(32_769, 32_768, 1, 0), png(1, 2**31 - 1, 8, 2),
     b"GIF89a" + struct.pack("<HH", 65535, 65535) + saved(Image.new("L", (8, 8)), "GIF")[10:],
     b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0)],
    ids=["png", "png just above", "png tall", "gif", "bmp"],
)  # fmt: skip
def test_a_bomb_is_refused_by_its_header(data: bytes) -> None:
    with pytest.raises(Unreadable) as caught:
        read_header(data)
    assert caught.value.reason == "decompression_bomb"


@pytest.mark.parametrize(("name", "expected"), [(b"zTXt", None), (b"iCCP", "corrupt")])
def test_a_bomb_in_a_text_is_passed_over_and_one_in_a_profile_is_a_reason(name: bytes, expected: str | None) -> None:
    body = b"Comment\x00\x00" + zlib.compress(bytes(100 << 20))
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    assert reason(png(1, 1, 8, 0, b"\x00\x00", chunk)) == expected


SEEDS: tuple[bytes, ...] = tuple(
    saved(smooth(), kind, exif=Image.Exif(), icc_profile=display_p3_gamma_2())
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
) + (
    saved(smooth(), "GIF"),
    saved(smooth(), "BMP"),
    saved(smooth().convert("RGBA"), "PNG"),
    saved(smooth().convert("P"), "PNG", transparency=3),
    saved(smooth().convert("CMYK"), "JPEG"),
    saved(smooth(), "TIFF", compression="tiff_lzw"),
)


@settings(deadline=None, database=None, derandomize=True, max_examples=300)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_changed_bytes_give_a_picture_or_a_reason_and_nothing_else(
    seed: bytes, changes: list[tuple[float, int]], head: bool, cut: bool
) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[int(place * (min(len(data), 300) if head else len(data)))] = value
    if cut:
        del data[int(changes[0][0] * len(data)) :]
    why = reason(bytes(data))
    assert why in (None, "corrupt", "truncated", "unsupported", "decompression_bomb")
    if why is None:  # what the index accepts, the builder can decode, at the size that was promised
        assert decode_rgb(bytes(data)).size == read_header(bytes(data)).size


@settings(deadline=None, database=None, derandomize=True, max_examples=100)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"]),
)
def test_any_bytes_at_all_give_a_reason(noise: bytes, start: bytes) -> None:
    assert reason(start + noise) in ("corrupt", "truncated", "unsupported", "decompression_bomb")
