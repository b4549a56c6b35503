"""Damaged pictures: judged as the index judges them in its child processes, and cropped as a shard's writer crops them.

What is accepted has Pillow's pixels: `decode_rgb` those of Pillow alone, its crops those of `decode_rgb`, and both the same
with and without the faster decoders.
"""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from fuzz_folder import data_run
from mutations import damaged, damaged_jpeg, damaged_png, damaged_riff, one_of
from PIL import Image, ImageCms, ImageFile, ImageOps
from trials import Target, Trial

from deepfloyd_core.index.index import look_at
from deepfloyd_core.index.judge import Entry, Verdict
from deepfloyd_core.pictures import plain
from deepfloyd_core.pictures.decode import decode_rgb
from deepfloyd_core.pictures.faults import PIXEL_ERRORS, Unreadable
from deepfloyd_core.pictures.resize import take_crops
from deepfloyd_core.sources.picture_bytes import HAS_HEIF, closed, without_text

REASONS = {"unsupported", "decompression_bomb", "truncated", "corrupt", "out_of_memory", "unreadable"}
_SIZE = 80, 72
_TURNED = Image.Exif()
_TURNED[0x0112] = 6
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")


def _picture(seed: int = 0) -> Image.Image:
    """Half smooth, half noise."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(0, 255, _SIZE[0] * _SIZE[1] * 3).reshape(_SIZE[1], _SIZE[0], 3).astype(np.uint8)
    pixels[:, : _SIZE[0] // 2] = rng.integers(0, 256, (_SIZE[1], _SIZE[0] // 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _saved(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (picture or _picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _pngs() -> list[bytes]:
    found = [_saved("PNG", _picture().convert(mode)) for mode in _MODES]
    found.append(_saved("PNG", Image.fromarray((np.arange(80 * 72).reshape(72, 80) * 11 % 65536).astype(np.uint16))))
    found += [_saved("PNG", exif=_TURNED), _saved("PNG", transparency=(1, 2, 3)), _saved("PNG", icc_profile=_profile())]
    return [*found, _saved("PNG", save_all=True, append_images=[_picture(1)])]


def _jpegs() -> list[bytes]:
    found = [_saved("JPEG", _picture().convert(mode)) for mode in ("RGB", "L", "CMYK")]
    found += [_saved("JPEG", progressive=True), _saved("JPEG", exif=_TURNED, quality=95, subsampling=0)]
    return [*found, _saved("JPEG", icc_profile=_profile()), _saved("JPEG", restart_marker_blocks=2)]


def _webps() -> list[bytes]:
    found = [_saved("WEBP"), _saved("WEBP", lossless=True), _saved("WEBP", _picture().convert("RGBA"))]
    return [*found, _saved("WEBP", exif=_TURNED), _saved("WEBP", save_all=True, append_images=[_picture(1)])]


def _others() -> list[bytes]:
    found = [
        _saved("BMP"),
        _saved("GIF"),
        _saved("BMP", _picture().convert("P")),
        _saved("TIFF", _picture().convert("CMYK")),
    ]
    found += [_saved("TIFF", compression=how) for how in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")]
    found += [_saved("AVIF"), _saved("AVIF", _picture().convert("RGBA"), exif=_TURNED)]
    return [*found, *([_saved("HEIF")] if HAS_HEIF else [])]


@contextmanager
def _judged(folder: Path) -> Iterator[Trial]:
    run, dataset = data_run(folder, {"minimum_image_size": 8, "resolution": 8})
    file = folder / "pictures" / "x.png"

    def trial(data: bytes) -> str:
        file.write_bytes(data)
        digest = sha256(data).hexdigest()
        verdict = look_at((run, dataset, Entry("set", file.name, len(data), digest, ("x",), None)))
        assert file.read_bytes() == data, "the picture was changed"
        if verdict.reason is None and verdict.stage1_reason is None:
            return _accepted(data, verdict)
        assert verdict.reason is None or (verdict.reason in REASONS and verdict.detail), str(verdict)
        return verdict.reason or str(verdict.stage1_reason)

    yield trial
    shutil.rmtree(folder)


def _accepted(data: bytes, verdict: Verdict) -> str:
    """An accepted picture has the pixels that Pillow gives, and crops of these."""
    assert verdict.width and verdict.height and verdict.look
    size = verdict.width, verdict.height
    crop = ((max(1, size[0] * 3 // 4), max(1, size[1] * 3 // 4)), (0, 0, 1, 1))
    whole = size, (0, 0, *size)
    try:
        pixels, (kept, scaled) = np.asarray(decode_rgb(data)), take_crops(data, [whole, crop])
    except Unreadable as error:
        assert error.reason == "out_of_memory", f"accepted, and then {error.reason}"
        return error.reason
    with patch.object(plain, "_decoders", dict):
        alone, (kept_alone, scaled_alone) = np.asarray(decode_rgb(data)), take_crops(data, [whole, crop])
    assert pixels.shape[1::-1] == size == alone.shape[1::-1], "another size than its verdict says"
    assert np.array_equal(pixels, alone), "other pixels with the faster decoder"
    assert np.array_equal(kept[0], pixels), "a whole crop has other pixels"
    assert np.array_equal(kept[0], kept_alone[0]) and np.array_equal(scaled[0], scaled_alone[0]), "other crops"
    said = pillow_says(data if verdict.note is None else closed(data))
    if said is None:
        return "accepted, as Pillow needs help"
    assert said.size == size and np.array_equal(pixels, np.asarray(said)), "other pixels than Pillow's"
    return "accepted"


def pillow_says(data: bytes) -> Image.Image | None:
    """The picture upright in RGB on white, by Pillow alone. None: it cannot, or it has a profile, which is for ImageCms."""
    try:
        opened = Image.open(io.BytesIO(data))
        profile = opened.info.get("icc_profile")
        opened.load()
        picture = ImageOps.exif_transpose(opened)
    except PIXEL_ERRORS:
        return None
    if profile or opened.info.get("icc_profile") or without_text(data) != data:
        return None
    if picture.mode.startswith("I"):
        clear = picture.info.get("transparency")
        wide = np.asarray(picture).astype(np.int64)
        grey = Image.fromarray(((wide.clip(0, 65535) + 128) // 257).astype(np.uint8))
        if not isinstance(clear, int):
            return grey.convert("RGB")
        picture = Image.merge("LA", (grey, Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8))))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, "white"), picture.getchannel("A"))


ImageFile.LOAD_TRUNCATED_IMAGES = False
TARGETS = (
    Target("pictures: PNG", _pngs, one_of(damaged, damaged_png, damaged_png), _judged),
    Target("pictures: JPEG", _jpegs, one_of(damaged, damaged, damaged_jpeg), _judged),
    Target("pictures: WebP", _webps, one_of(damaged, damaged_riff), _judged),
    Target("pictures: BMP, GIF, TIFF, AVIF, HEIF", _others, damaged, _judged),
)
