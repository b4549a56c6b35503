"""Six folders as people have them, for `deepfloyd init`: drawn here, with what is in each counted by hand."""

import io
import os
from pathlib import Path

import numpy as np
from photographs import SOURCES
from PIL import Image

ONES_SIZE = (450, 350)  # of the only picture of `one`
MIXED = 5000
MIXED_SIZES = ((300, 300), (400, 300), (300, 400), (640, 360), (70, 60))  # the last is too small


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """A picture like no other."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def pet(folder: Path) -> None:
    """Twelve upright pictures of a phone, 3:4, without captions."""
    folder.mkdir(parents=True)
    for number in range(12):
        smooth(number, 360, 480).save(folder / f"IMG_{1000 + number}.JPG")


def face(folder: Path) -> None:
    """Nine wide pictures of one face, which is at their left."""
    folder.mkdir(parents=True)
    photograph = Image.open(SOURCES["skimage"] / "astronaut.png").convert("RGB")
    for number in range(9):
        photograph.crop((60 + number, 0, 512, 280)).save(folder / f"DSC{number:04}.jpg", quality=95)


def drawings(folder: Path) -> None:
    """Thirty square pictures with a text beside each: three captions, the first the commonest."""
    folder.mkdir(parents=True)
    for number in range(30):
        smooth(number, 300, 300).save(folder / f"{number:02}.png")
        what = ("cat", "cat", "tree", "boat")[number % 4]
        (folder / f"{number:02}.txt").write_text(f"an ink drawing of a {what}\n", encoding="utf-8")


def phone_export(folder: Path) -> None:
    """Six HEIC pictures, ten JPEGs that their EXIF turns upright, a screenshot, a film, an edit and a damaged picture."""
    import pillow_heif

    folder.mkdir(parents=True)
    for number in range(6):
        pillow_heif.from_pillow(smooth(number, 400, 300)).save(folder / f"IMG_{number:04}.HEIC", quality=50)
    exif = Image.Exif()
    exif[0x112] = 6
    for number in range(10):
        smooth(20 + number, 400, 300).save(folder / f"IMG_{number:04} (1) – Kopie.JPG", exif=exif)
    smooth(40, 390, 844).save(folder / "Screenshot 2024-01-01 at 10.00.00.png")
    whole = (folder / "IMG_0000 (1) – Kopie.JPG").read_bytes()
    (folder / 'it\'s "broken" #1.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / "IMG_0001.MOV").write_bytes(b"\0\0\0\x14ftypqt  ")
    (folder / "IMG_0001.AAE").write_text("<plist/>")


def one(folder: Path) -> None:
    """One wide picture."""
    folder.mkdir(parents=True)
    smooth(0, *ONES_SIZE).save(folder / "a.png")


def mixed(folder: Path) -> None:
    """5,000 names in five subfolders, for a picture of each of MIXED_SIZES."""
    folder.mkdir(parents=True)
    blobs = []
    for number, size in enumerate(MIXED_SIZES):
        (folder / f"set{number}").mkdir()
        file = io.BytesIO()
        smooth(number, *size).save(file, "JPEG")
        blobs.append(file.getvalue())
    for number in range(MIXED):
        path = folder / f"set{number % 5}" / f"{number:05}.jpg"
        if number < 5:
            path.write_bytes(blobs[number])
        else:
            os.link(folder / f"set{number % 5}" / f"{number % 5:05}.jpg", path)
