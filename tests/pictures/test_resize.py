"""Crops are made from scaled decodes, and equal the literal recipe to 40 dB all the same: photographs, patterns, formats."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrowing import known
from photographs import SOURCES
from PIL import Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from deepfloyd_core.pictures import decode as pictures
from deepfloyd_core.pictures import resize as shrink
from deepfloyd_core.pictures.decode import Header, Reduced, decode_reduced, decode_rgb
from deepfloyd_core.pictures.detail import detail_of_jpeg
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.jpeg_scans import Layout, read_layout, sample_jpegs, without_detail
from deepfloyd_core.pictures.resize import take_crops

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's warnings on hostile files are not errors in a run

NAMES = (
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "grass.png",
    "gravel.png",
    "brick.png",
    "rocket.jpg",
    "retina.jpg",
)
PHOTOGRAPHS = (
    *[SOURCES["skimage"] / name for name in (*NAMES, "hubble_deep_field.jpg")],
    *[SOURCES["sklearn"] / name for name in ("china.jpg", "flower.jpg")],
)
ENCODINGS: dict[str, dict[str, object]] = {
    "4:2:0": {"format": "JPEG", "quality": 85},
    "4:4:4": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "4:2:2": {"format": "JPEG", "quality": 75, "subsampling": 1, "restart_marker_blocks": 7},
    "progressive": {"format": "JPEG", "quality": 85, "progressive": True},
    "PNG": {"format": "PNG", "compress_level": 1},
    "WEBP": {"format": "WEBP", "quality": 80, "method": 0},
}


def saved(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()


@cache
def photograph(path: Path) -> Image.Image:
    """Pixels alone, of at most 512x512."""
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((512, 512))
    picture.info.clear()
    return picture


def literal(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Both edges x0.75 with LANCZOS while an edge is above 1.5x its target, then LANCZOS to the exact size."""
    while picture.width > 1.5 * size[0] or picture.height > 1.5 * size[1]:
        step = max(size[0], round(picture.width * 0.75)), max(size[1], round(picture.height * 0.75))
        picture = picture.resize(step, Image.Resampling.LANCZOS)
    return picture.resize(size, Image.Resampling.LANCZOS)


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    error = np.mean((one.astype(float) - two.astype(float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def scaled_to(size: tuple[int, int], edge: int) -> tuple[int, int]:
    width, height = (max(edge, round(side * edge / min(size))) for side in size)
    return width, height


def compare(data: bytes, picture: Image.Image, edge: int) -> tuple[float, str]:
    """PSNR of a crop, off the centre, to the literal recipe on the decoded picture; and how it was made."""
    size = scaled_to(picture.size, edge)
    left, top = (size[0] - edge) // 3, (size[1] - edge) // 3
    box = (left, top, left + edge, top + edge)
    ((made, method),) = take_crops(data, [(size, box)])
    assert made.shape == (edge, edge, 3)
    assert made.dtype == np.uint8
    return psnr(made, np.asarray(literal(picture, size).crop(box))), method


# ---- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_photographs_of_every_encoding_equal_the_literal_recipe_to_40_db(encoding: str) -> None:
    methods = []
    for path in PHOTOGRAPHS:
        picture = photograph(path)
        data = saved(picture, **ENCODINGS[encoding])
        found, method = compare(data, Image.open(io.BytesIO(data)).convert("RGB"), 64)
        assert found >= 40, f"{path.name}: {found:.1f} dB by {method}"
        methods.append(method)
    assert sum(method.startswith("scaled 1/") for method in methods) >= len(methods) - 4, "scaled decodes are the rule"


def test_a_large_photograph_is_decoded_at_one_eighth() -> None:
    picture = Image.open(PHOTOGRAPHS[-1]).convert("RGB").resize((1700, 1134), Image.Resampling.LANCZOS)
    for encoding in ("4:2:0", "progressive"):
        data = saved(picture, **ENCODINGS[encoding])
        found, method = compare(data, Image.open(io.BytesIO(data)), 64)
        assert method == "scaled 1/8"
        assert found >= 43


@cache
def patterns(width: int, height: int) -> dict[str, Image.Image]:
    """What means, aliases and clipping get wrong, most of it in black and white."""
    made: dict[str, np.ndarray] = {}
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(0)
    for cell in (1, 2, 3, 8, 9, 16, 24, 50):
        made[f"checkerboard {cell}"] = (x // cell + y // cell) % 2 * 255
    for period in (2, 3, 4, 5, 8, 9, 17, 40):
        made[f"lines {period}"] = (y % period == 0) * 255
        made[f"grid {period}"] = (((y + 1) % period == 0) | (x % period == 0)) * 255
    made["diagonal"] = ((x + 2 * y) // 5 % 2) * 255
    made["noise"] = rng.integers(0, 256, (height, width))
    made["bits"] = np.kron(rng.integers(0, 2, (height // 4 + 1, width // 4 + 1)) * 255, np.ones((4, 4)))[
        :height, :width
    ]
    made["rings"] = 127.5 + 127 * np.cos(np.pi * ((x - width / 2) ** 2 + (y - height / 2) ** 2) / width)
    made["a margin of one pixel"] = ((x == 0) | (y == 0) | (x == width - 1) | (y == height - 1)) * 255
    made["gradient"] = 255 * x / width
    for wave in (8.5, 10.3, 12.1, 4.3):  # a mean of 8 or 4 px takes these for slow ones
        made[f"soft stripes {wave}"] = 127.5 + 50 * np.cos(2 * np.pi * x / wave)
    gray = {name: Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)) for name, array in made.items()}
    soft = gray["checkerboard 24"].point(lambda level: 40 + level * 175 // 255)
    colour = Image.merge("RGB", [soft, soft.point(lambda level: 255 - level), Image.new("L", soft.size, 90)])
    return {
        **{name: picture.convert("RGB") for name, picture in gray.items()},
        "soft": soft.convert("RGB"),
        "colour": colour,
    }


@pytest.mark.parametrize(
    "encoding", ["4:2:0", "PNG", *(pytest.param(name, marks=pytest.mark.slow) for name in ("4:4:4", "progressive"))]
)
def test_hard_patterns_equal_the_literal_recipe_to_40_db(encoding: str) -> None:
    for name, picture in patterns(435, 373).items():
        data = saved(picture, **ENCODINGS[encoding])
        for edge in (21, 64) if name in ("soft", "colour") else (21,):
            found, method = compare(data, Image.open(io.BytesIO(data)).convert("RGB"), edge)
            assert found >= 40, f"{name} at {edge}: {found:.1f} dB by {method}"


def test_40_db_tells_the_recipe_from_one_plain_step() -> None:
    picture = Image.open(PHOTOGRAPHS[0]).convert("RGB")
    expected = np.asarray(literal(picture, (64, 64)))
    assert psnr(np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR)), expected) < 40
    assert psnr(np.asarray(picture.resize((64, 64), Image.Resampling.NEAREST)), expected) < 25


@pytest.mark.parametrize("orientation", range(1, 9))
def test_odd_sizes_and_all_eight_orientations_lose_no_part_of_a_pixel(orientation: int) -> None:
    # A decode at 1/8 rounds the size up, at the stored right and bottom: half a pixel of shift costs 15 dB here.
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = Image.open(PHOTOGRAPHS[1]).convert("RGB")
    for odd in (1, 4, 7) if orientation % 2 else (2, 3, 5, 6):
        stored = source.crop((0, 0, 520 + odd, 392 + (odd * 3) % 8))
        data = saved(stored, format="JPEG", quality=92, exif=exif)
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        found, method = compare(data, picture, 24)
        assert (found >= 43, method) == (True, "scaled 1/8"), f"{found:.1f} dB, {method}"


def test_crops_at_the_edges_of_a_picture_are_as_good_as_in_the_middle() -> None:
    picture = Image.open(PHOTOGRAPHS[1]).convert("RGB")
    data = saved(picture, **ENCODINGS["4:4:4"])
    size = scaled_to(picture.size, 100)
    expected = literal(Image.open(io.BytesIO(data)), size)
    corners = [(x, y, x + 40, y + 30) for x in (0, size[0] - 40) for y in (0, size[1] - 30)]
    for box, (made, method) in zip(corners, take_crops(data, [(size, box) for box in corners]), strict=True):
        assert method == "scaled 1/2"
        assert psnr(made, np.asarray(expected.crop(box))) >= 40


def test_a_picture_is_decoded_once_for_all_its_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    decodes: list[int] = []

    def counted(data: bytes, header: Header, divisor: int, layout: Layout | None) -> Reduced | None:
        decodes.append(divisor)
        return decode_reduced(data, header, divisor, layout)

    monkeypatch.setattr(shrink, "decode_reduced", counted)
    monkeypatch.setattr(shrink, "decode_rgb", lambda data: pytest.fail("a full decode"))
    data = saved(Image.open(PHOTOGRAPHS[-1]), **ENCODINGS["4:2:0"])
    made = take_crops(data, [((96, 64), (left, 0, left + 64, 64)) for left in (0, 7, 32)])
    assert decodes == [2]
    assert {method for _, method in made} == {"scaled 1/2"}
    assert not np.array_equal(made[0][0], made[1][0])


def test_a_picture_at_its_own_size_is_only_cropped_and_one_slightly_larger_is_resized_literally() -> None:
    picture = Image.open(PHOTOGRAPHS[0]).convert("RGB")
    data = saved(picture, format="PNG")
    ((kept, method),) = take_crops(data, [(picture.size, (3, 5, 67, 69))])
    assert (method, np.array_equal(kept, np.asarray(picture.crop((3, 5, 67, 69))))) == ("kept", True)
    ((near, method),) = take_crops(data, [((300, 300), (10, 10, 200, 200))])
    expected = np.asarray(literal(picture, (300, 300)).crop((10, 10, 200, 200)))
    assert (method, np.array_equal(near, expected)) == ("literal", True)


# ---- colours ----------------------------------------------------------------------------------------------------------


def upright_srgb(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    source = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
    target = ImageCms.createProfile("sRGB")
    return known(ImageCms.profileToProfile(picture, source, target, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB"))


def test_a_profile_is_applied_to_the_means_where_that_is_the_same() -> None:
    rocket = next(path for path in PHOTOGRAPHS if path.name == "rocket.jpg")
    data = rocket.read_bytes()  # Adobe RGB
    found, method = compare(data, upright_srgb(data), 32)
    assert found >= 40
    assert method.startswith("scaled")
    assert compare(data, Image.open(rocket).convert("RGB"), 32)[0] < 35, (
        "without the profile it would be another picture"
    )


def test_a_profile_that_bends_colours_strongly_is_applied_before_anything_is_averaged() -> None:
    linear = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    place = linear.index(b"para")  # the curve that red, green and blue share: a gamma of 2.4, and a straight start
    linear[place + 8 : place + 10] = b"\0\0"  # becomes a plain power
    linear[place + 12 : place + 16] = (65536).to_bytes(4, "big")  # of 1
    picture = Image.open(PHOTOGRAPHS[2]).convert("RGB")
    data = saved(picture, format="JPEG", quality=90, icc_profile=bytes(linear))
    assert psnr(np.asarray(upright_srgb(data)), np.asarray(picture)) < 20
    found, method = compare(data, upright_srgb(data), 32)
    assert found >= 40
    assert method == "literal"


def test_gray_cmyk_and_palette_pictures_keep_their_colours() -> None:
    picture = Image.open(PHOTOGRAPHS[1]).convert("RGB")
    for data in (
        saved(picture.convert("L"), format="JPEG", quality=90),
        saved(picture.convert("CMYK"), format="JPEG", quality=90),
        saved(picture.quantize(64), format="GIF"),
        saved(picture.convert("RGBA"), format="PNG", compress_level=1),
    ):
        found, method = compare(data, Image.open(io.BytesIO(data)).convert("RGB"), 48)
        assert found >= 40, method


# ---- progressive JPEGs ------------------------------------------------------------------------------------------------


def at_one_eighth(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    picture.draft(None, (picture.width // 8, picture.height // 8))
    return np.asarray(picture)


@pytest.mark.parametrize("size", [(640, 427), (633, 426), (505, 399), (16, 8), (9, 300)])
@pytest.mark.parametrize("subsampling", [0, 1, 2, None])
def test_scans_without_effect_on_one_eighth_are_left_out_bit_by_bit(
    size: tuple[int, int], subsampling: int | None
) -> None:
    picture = Image.open(PHOTOGRAPHS[-1]).crop((0, 0, *size))
    picture = picture.convert("L") if subsampling is None else picture
    # 75: the steps of the subsampled colours are too large for their last bits to be left out as well.
    data = saved(picture, format="JPEG", quality=75, progressive=True, subsampling=subsampling or 0)
    layout = read_layout(data)
    assert layout is not None
    lean = without_detail(data, layout, 8)
    assert lean is not None
    assert len(lean) < len(data) * 0.75 or size[0] < 100
    assert np.array_equal(at_one_eighth(lean), at_one_eighth(data))


def coefficients(data: bytes) -> np.ndarray:
    """Of a gray JPEG, in steps of its table and nearly whole, from its pixels: (blocks, 8, 8)."""
    picture = Image.open(io.BytesIO(data))
    assert isinstance(picture, JpegImageFile)
    n = np.arange(8)
    dct = np.sqrt(np.where(n[:, None] == 0, 1, 2) / 8) * np.cos((2 * n + 1) * n[:, None] * np.pi / 16)
    pixels = np.asarray(picture).astype(float)[: picture.height // 8 * 8, : picture.width // 8 * 8]
    blocks = pixels.reshape(picture.height // 8, 8, -1, 8).swapaxes(1, 2).reshape(-1, 8, 8)
    return np.asarray(dct @ blocks @ dct.T / np.reshape(picture.quantization[0], (8, 8)))


def test_at_one_quarter_exactly_the_last_bits_are_left_out() -> None:
    # Large steps, so that the rounding of pixels hides no coefficient. Smoothing would show in coefficients that are 0.
    picture = Image.open(PHOTOGRAPHS[-1]).convert("L").point(lambda level: 60 + level // 2)
    y, x = np.mgrid[0:8, 0:8]
    for low, high, bits in ((6, 6, 1), (2, 8, 2)):  # steps of the five lowest frequencies, and of the others
        steps = np.where((x + y > 0) & (x + y <= 2), low, high)
        data = saved(picture, format="JPEG", qtables=[steps.ravel().tolist()], progressive=True)
        layout = read_layout(data)
        assert layout is not None
        lean = without_detail(data, layout, 4)
        assert lean is not None
        whole, left = np.rint(coefficients(data)), coefficients(lean)
        expected = np.trunc(whole / 2**bits) * 2**bits
        clear = (steps >= 6) & (x + y > 0)
        assert np.count_nonzero(whole[:, clear] % 2) > 1000
        assert np.abs(left - expected)[:, clear].max() < 1, "all of them multiples of 2 or 4"


def test_last_bits_stay_where_steps_are_large_or_pixels_are_fine() -> None:
    picture = Image.open(PHOTOGRAPHS[-1])

    def left_out(divisor: int, **options: object) -> int:
        data = saved(picture, format="JPEG", progressive=True, **options)
        layout = read_layout(data)
        assert layout is not None
        lean = without_detail(data, layout, divisor)
        after = read_layout(lean) if lean else layout
        assert after is not None
        assert [scan.components for scan in after.scans if not scan.first] == [b"\1\2\3"] * 2
        sizes = [[s.segment.end - s.segment.coded for s in one.scans if s.known and s.first] for one in (layout, after)]
        return sum(size == 2 for size in sizes[1]) - sum(size == 2 for size in sizes[0])

    assert [left_out(4, quality=quality, subsampling=2) for quality in (50, 70, 75, 90, 92, 95)] == [0, 0, 1, 1, 2, 2]
    assert [left_out(4, quality=quality, subsampling=0) for quality in (75, 90)] == [1, 1], "not of colours as well"
    assert [left_out(8, quality=quality, subsampling=2) for quality in (75, 90)] == [0, 2], "colours alone"
    assert left_out(2, quality=95, subsampling=0) == left_out(1, quality=95, subsampling=0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("quality", [75, 87, 92])
@pytest.mark.parametrize(("edge", "how"), [(40, "scaled 1/4"), (20, "scaled 1/8")])
def test_photographs_without_their_last_bits_lose_little(
    quality: int, edge: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in PHOTOGRAPHS:
        picture = Image.open(path).convert("RGB")
        picture.info.clear()
        picture = picture.crop((0, 0, min(503, picture.width), 327))
        data = saved(picture, format="JPEG", quality=quality, progressive=True)
        decoded = Image.open(io.BytesIO(data)).convert("RGB")
        found, method = compare(data, decoded, edge)
        assert found >= 40, f"{path.name}: {found:.1f} dB by {method}"
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "without_detail", lambda *_: None)
            whole, before = compare(data, decoded, edge)
        if method == before == how:
            assert found >= whole - 0.6, f"{path.name}: {whole:.2f} to {found:.2f} dB"


def test_what_is_not_an_ordinary_progressive_jpeg_is_left_alone() -> None:
    picture = Image.open(PHOTOGRAPHS[-1])
    baseline = saved(picture, format="JPEG")
    progressive = saved(picture, format="JPEG", progressive=True)
    restarts = saved(picture, format="JPEG", progressive=True, restart_marker_blocks=4)
    layout = read_layout(baseline)
    assert layout is not None
    assert without_detail(baseline, layout, 8) is None
    layout = read_layout(restarts)
    assert layout is not None
    assert without_detail(restarts, layout, 8) is None
    layout = read_layout(progressive)
    assert layout is not None
    last = layout.scans[-1].segment
    unfinished = progressive[: last.start] + b"\xff\xd9"  # a bit of luma is still missing: libjpeg smooths such blocks
    layout = read_layout(unfinished)
    assert layout is not None
    assert without_detail(unfinished, layout, 8) is None
    assert read_layout(progressive[: last.start]) is None
    assert read_layout(saved(picture, format="PNG")) is None
    arithmetic = bytearray(baseline)
    arithmetic[arithmetic.index(b"\xff\xc0") + 1] = 0xC9
    assert read_layout(bytes(arithmetic)) is None


def test_a_sample_of_a_jpeg_shows_its_blocks() -> None:
    picture = Image.open(PHOTOGRAPHS[0]).convert("RGB")
    for encoding in ("4:2:0", "4:4:4", "4:2:2", "progressive"):
        data = saved(picture, **ENCODINGS[encoding])
        layout = read_layout(data)
        assert layout is not None
        assert sample_jpegs(data, layout)
        seen = detail_of_jpeg(data, layout)
        assert seen is not None
        true = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(float)
        blocks = true.reshape(64, 8, 64, 8)
        contrast = np.sqrt(np.mean((blocks - blocks.mean((1, 3), keepdims=True)) ** 2))
        assert seen.contrast == pytest.approx(contrast, rel=0.35), encoding


# ---- hostile bytes ----------------------------------------------------------------------------------------------------

SMALL = Image.open(PHOTOGRAPHS[2]).convert("RGB").resize((210, 140))
SEEDS = tuple(saved(SMALL, **ENCODINGS[name]) for name in ("4:2:0", "4:2:2", "progressive", "progressive"))
# The first bytes after each marker: lengths, sizes, tables, what a scan brings.
HEADS = {seed: [place + n for place in range(len(seed) - 12) if seed[place] == 255 and seed[place + 1] for n in range(12)]
         for seed in SEEDS}  # fmt: skip


@settings(deadline=None, database=None, derandomize=True, max_examples=200)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.booleans(),
    st.floats(0.3, 1.5),
)
def test_changed_bytes_give_a_crop_or_a_reason_and_nothing_else(
    seed: bytes, changes: list[tuple[float, int]], heads: bool, length: float
) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[HEADS[seed][int(place * len(HEADS[seed]))] if heads else int(place * len(data))] = value
    del data[int(length * len(data)) :]
    layout = read_layout(bytes(data))
    if layout is not None:
        sample_jpegs(bytes(data), layout)
        for divisor in (4, 8):
            without_detail(bytes(data), layout, divisor)
    try:
        size = decode_rgb(bytes(data)).size
        if min(size) >= 16:
            ((made, _),) = take_crops(bytes(data), [(scaled_to(size, 8), (0, 0, 8, 8))])
            assert made.shape == (8, 8, 3)
    except Unreadable as error:
        assert error.reason in ("corrupt", "truncated", "unsupported", "decompression_bomb")


@settings(deadline=None, database=None, derandomize=True, max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_at_all_have_a_layout_or_none(noise: bytes) -> None:
    for start in (
        b"\xff\xd8",
        b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x40\x00\x40\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xda",
    ):
        layout = read_layout(start + noise)
        if layout is not None:
            sample_jpegs(start + noise, layout)
            without_detail(start + noise, layout, 4)
