"""What phones, cameras and drawing programs write: each file gets the right answer, and what is accepted is cropped.

The other computation: the pixels that the picture was drawn with, or what Pillow decodes of the undamaged file.
"""

import io
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from artifact_rows import ledger, live_rows
from data_world import DataWorld
from PIL import Image, PngImagePlugin
from PIL.ImageCms import ImageCmsProfile, createProfile

from deepfloyd_core.index import identity
from deepfloyd_core.index.scan import scan
from deepfloyd_core.pictures.decode import check_decodes, decode_rgb
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.resize import take_crops
from deepfloyd_core.sources import picture_bytes

SIZE = (160, 120)


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture with contrast and colour; which way is up can be seen."""
    small = np.random.default_rng(3).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    small[0, 0] = (255, 0, 0)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(one: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    one.save(buffer, kind, **how)
    return buffer.getvalue()


def texts(*sizes: int, packed: bool = True) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for number, size in enumerate(sizes):
        info.add_text(f"workflow {number}", "x" * size, zip=packed)
    return info


def large_profile() -> bytes:
    """A valid sRGB profile followed by 3 MB that no reader looks at, as tables of printers are."""
    data = bytearray(ImageCmsProfile(createProfile("sRGB")).tobytes())
    data += bytes(3_000_000)
    data[:4] = len(data).to_bytes(4, "big")
    return bytes(data)


def film() -> list[Image.Image]:
    return [Image.new("RGB", SIZE, "white"), Image.new("RGB", SIZE, "black")]


MOTION = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 400
FILES = {
    "workflow.png": encoded(picture(), "PNG", pnginfo=texts(3_000_000)),
    "many texts.png": encoded(picture(), "PNG", pnginfo=texts(*[900_000] * 80)),
    "plain text.png": encoded(picture(), "PNG", pnginfo=texts(3_000_000, packed=False)),
    "profile.png": encoded(picture(), "PNG", icc_profile=large_profile()),
    "profile.jpg": encoded(picture(), "JPEG", quality=95, icc_profile=large_profile()),
    "profile.webp": encoded(picture(), "WEBP", quality=95, icc_profile=large_profile()),
    "motion photo.jpg": encoded(picture(), "JPEG", quality=95) + MOTION,
    "samsung.jpg": encoded(picture(), "MPO", quality=95, save_all=True, append_images=film()),
    "padded.jpg": encoded(picture(), "JPEG", quality=95) + bytes(5000),
    "no end.jpg": encoded(picture(), "JPEG", quality=95)[:-2],
    "half an end.jpg": encoded(picture(), "JPEG", quality=95)[:-1],
    "no end, progressive.jpg": encoded(picture(), "JPEG", quality=95, progressive=True)[:-2],
    "no end.png": encoded(picture(), "PNG")[:-12],
    "no end.gif": encoded(picture().quantize(), "GIF")[:-1],
    "print.jpg": encoded(picture().convert("CMYK"), "JPEG", quality=95),
    "pages.tif": encoded(picture(), "TIFF", save_all=True, append_images=film()),
    "film.webp": encoded(picture(), "WEBP", quality=95, save_all=True, append_images=film()),
    "film.gif": encoded(picture(), "GIF", save_all=True, append_images=film()),
    "film.avif": encoded(picture(), "AVIF", quality=95, save_all=True, append_images=film()),
    "film.png": encoded(picture(), "PNG", save_all=True, append_images=film()),
}


def png_of_zeros(edge: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = edge.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def half(data: bytes) -> bytes:
    return data[: len(data) * 6 // 10]


REFUSED = {
    "jxl.jxl": (b"\xff\x0a" + bytes(99), "unsupported", "JPEG XL: convert"),
    "jxl in boxes.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "unsupported", "JPEG XL: convert"),
    "jp2.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "unsupported", "JPEG 2000: convert"),
    "layers.png": (b"8BPS\0\x01" + bytes(99), "unsupported", "Photoshop: convert"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported", "SVG: convert"),
    "film.jpg": (MOTION, "unsupported", "a film, no picture"),
    "bomb.png": (png_of_zeros(60_000), "decompression_bomb", "60000x60000 is above"),
    "half.jpg": (half(encoded(picture(), "JPEG")), "truncated", ""),
    "half, progressive.jpg": (half(encoded(picture(), "JPEG", progressive=True)), "truncated", ""),
    "half.png": (half(encoded(picture(), "PNG")), "truncated", ""),
    "half.webp": (half(encoded(picture(), "WEBP")), "truncated", ""),
}


def off(crop: bytes, size: tuple[int, int]) -> float:
    """Root mean square difference to the picture itself, in levels."""
    pixels = np.frombuffer(crop, np.uint8).reshape(size[1], size[0], 3).astype(float)
    expected = np.asarray(picture().resize(size, Image.Resampling.LANCZOS)).astype(float)
    return float(np.sqrt(((pixels - expected) ** 2).mean()))


def test_each_file_gets_its_answer(world: DataWorld) -> None:
    for name, data in FILES.items():
        world.add(name, data)
    for name, (data, _, _) in REFUSED.items():
        world.add(name, data)
    run = world.load({"crop": False, "crop_aspect": "preserve"}, stages=(1,), max_rejected_share=1.0)
    index = world.index(run)
    rows = ledger(index)
    assert {name: (rows[name]["reason"], rows[name]["detail"]) for name in FILES if rows[name]["reason"]} == {}
    for name, (_, reason, detail) in REFUSED.items():
        assert rows[name]["reason"] == reason and (rows[name]["detail"] or "").startswith(detail), name
    ends = [name for name, row in rows.items() if row["note"] == "lacks the mark of its end, and nothing else"]
    assert ends == ["half an end.jpg", "no end, progressive.jpg", "no end.jpg"]
    crops = {
        row["source"]: off(row["pixels"], (row["width"], row["height"]))
        for row in live_rows(world.pixels(run, index, 1))
    }
    assert set(crops) == set(FILES)
    few = {"no end.gif": 25, "film.gif": 25, "print.jpg": 30}  # 256 colours; inks are other colours without a profile
    assert {name: value for name, value in crops.items() if value > few.get(name, 8)} == {}


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_is_accepted_exactly_when_no_pixel_is_lost(progressive: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    whole = encoded(Image.fromarray(noise), "JPEG", quality=70, progressive=progressive)
    pixels = np.asarray(Image.open(io.BytesIO(whole)))
    answers = []
    for lost in range(1, 40):
        same = np.array_equal(np.asarray(Image.open(io.BytesIO(whole[:-lost] + b"\xff\xd9"))), pixels)
        try:
            decoded = np.asarray(decode_rgb(whole[:-lost]))
        except Unreadable as error:
            assert error.reason == "truncated"
            answers.append(False)
        else:
            assert np.array_equal(decoded, pixels)
            answers.append(True)
        assert not answers[-1] or same, f"{lost} bytes"
    assert answers[:2] == [True, True] and not any(answers[8:])


def test_a_phone_s_108_megapixels_are_accepted_and_cropped_and_a_smaller_memory_refuses_them(world: DataWorld) -> None:
    large = Image.new("RGB", (12_000, 9000), (200, 100, 50))
    large.paste(picture((6000, 4500)), (0, 0))
    data = encoded(large, "JPEG", quality=70)
    del large
    crop, how = take_crops(data, [((85, 64), (0, 0, 64, 64))])[0]
    assert how == "scaled 1/8" and crop[0, 0, 0] > 200 and crop[0, 0, 2] < 60
    world.add("large.jpg", data)
    world.add("small.png", picture())
    rows = ledger(world.index(world.load(stages=(1,), max_rejected_share=0.5, decode_memory_mib=512)))
    assert rows["large.jpg"]["reason"] == "decompression_bomb"
    assert rows["large.jpg"]["detail"] == "12000x9000 px take 1,132 MiB to decode, and decode_memory_mib = 512"
    rows = ledger(world.index(world.load(stages=(1,))))
    assert (rows["large.jpg"]["reason"], rows["large.jpg"]["width"]) == (None, 12_000), "with more memory: judged again"


def heic(orientation: int) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    profile = ImageCmsProfile(createProfile("sRGB")).tobytes()
    one = picture()
    one.info["icc_profile"] = profile
    pillow_heif.from_pillow(one).save(buffer, quality=95, exif=exif.tobytes())
    return buffer.getvalue()


TURNS = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}


@pytest.mark.parametrize("orientation", TURNS)
def test_heic_lies_as_its_phone_held_it(world: DataWorld, orientation: int) -> None:
    data = heic(orientation)
    turn = TURNS[orientation]
    upright = picture() if turn is None else picture().transpose(turn)
    decoded = decode_rgb(data)
    assert decoded.size == upright.size
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(upright)).mean() < 4
    world.add("a.heic", data)
    world.add("b.png", upright.resize((upright.width * 2, upright.height * 2)))
    rows = ledger(world.index(world.load(stages=(1,))))
    assert (rows["a.heic"]["reason"], rows["a.heic"]["width"], rows["a.heic"]["height"]) == (None, *upright.size)
    assert rows["a.heic"]["group"] == rows["b.png"]["group"] is not None


def test_the_box_of_a_heic_turns_it_and_not_the_tag_in_its_exif() -> None:
    """Bytes of the file changed by hand: ISO 23008-12 has the angle in the box `irot`, and EXIF's tag for information."""
    data = heic(6)
    at = data.index(b"irot") + 4
    assert data[at] == 3, "three times 90 degrees against the clock"
    decoded = decode_rgb(data[:at] + bytes([1]) + data[at + 1 :])
    assert (
        np.abs(np.asarray(decoded).astype(int) - np.asarray(picture().transpose(Image.Transpose.ROTATE_90))).mean() < 4
    )


@pytest.mark.parametrize("name", ["a.heic", "a.jpg", "a"])
def test_heic_without_its_reader_is_named_with_the_command_and_judged_once_it_is_there(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    world.add(name, heic(1))
    world.add("b.png", picture())
    with monkeypatch.context() as without:
        without.setattr(identity, "HAS_HEIF", False)
        without.setattr(picture_bytes, "HAS_HEIF", False)
        without.setattr("deepfloyd_core.pictures.decode.FORMATS", ("JPEG", "PNG"))
        with pytest.raises(
            Unreadable, match=r"HEIC: pip install 'deepfloyd-pipeline\[heif\]' reads it, or convert it to JPEG"
        ):
            check_decodes(heic(1))
        before = identity.index_request(world.load(stages=(1,)), world_scan(world))
    assert before.fingerprint != identity.index_request(world.load(stages=(1,)), world_scan(world)).fingerprint


def world_scan(world: DataWorld) -> pa.Table:
    return scan(world.load(stages=(1,)))
