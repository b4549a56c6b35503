"""The contact sheet of rejected pictures: a few for each reason, safely decoded, the same bytes however it was made."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_functions import killed_by_name
from PIL import Image, ImageDraw, ImageFile

from deepfloyd_core import image_index, rejected, scan as scanning
from deepfloyd_core.artifacts import Artifact
from deepfloyd_core.children import Children, Limits
from deepfloyd_core.pictures import Unreadable, decode_what_is_there
from deepfloyd_core.sheets import fitted, font


def scene(seed: int, width: int = 300, height: int = 220) -> Image.Image:
    """A picture in which one sees how much of it is there."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([across, down, np.full_like(across, 128)], -1).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = rng.integers(0, width), rng.integers(0, height)
        pen.ellipse((x - 30, y - 30, x + 30, y + 30), tuple(int(c) for c in rng.integers(0, 256, 3)))
    return picture


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def damaged(data: bytes, seed: int) -> bytes:
    """The bytes with some in the middle overwritten."""
    start = len(data) // 2
    noise = np.random.default_rng(seed).integers(0, 256, 40, dtype=np.uint8).tobytes()
    return data[:start] + noise + data[start + 40 :]


def fill(world: Any) -> None:
    """A world with good pictures and most of the reasons that there are."""
    for number in range(4):
        world.add(f"good/{number}.png", scene(number))
    for number in range(9):
        world.add(f"small/icon {number}.png", scene(number, 20 + 5 * number, 40))
    world.add("small/\u202eright to left\nin two lines é 图片.png", scene(90, 40, 40))
    world.add("/".join(["d" * 200] * 15) + "/the end of a long name.png", scene(91, 30, 50))
    for number, size in enumerate([(2000, 80), (70, 900)]):
        world.add(f"wide/panorama {number}.jpg", scene(number, *size))
    for number, kind in enumerate(["JPEG", "PNG", "WEBP", "GIF"]):
        data = encoded(scene(number), kind)
        world.add(f"cut/{kind} {number}.{kind.lower()}", data[: len(data) * 6 // 10])
    data = encoded(scene(7), "JPEG", progressive=True)
    world.add("cut/progressive.jpg", data[: len(data) // 2])
    world.add("cut/turned.jpg", encoded(scene(8), "JPEG", exif=turned())[:-3000])
    for number in range(3):
        world.add(f"bad/{number}.png", damaged(encoded(scene(number), "PNG"), number))
    world.add("texts/notes.jpg", b"this is not a picture")
    world.add("texts/empty.jpg", b"")
    world.add("bombs/large.png", encoded(Image.new("1", (20_000, 20_000)), "PNG"))
    world.add("silent/no caption.png", scene(5), caption=None)
    os.mkfifo(world.folder / "pictures" / "pipe.jpg")
    (world.folder / "pictures" / "link.jpg").symlink_to("/etc/hostname")
    (world.folder / "pictures" / os.fsdecode(b"broken \xff name.jpg")).write_bytes(b"x")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def load(world: Any, **keys: Any) -> Any:
    entry = {"crop": True, "crop_aspect": "preserve", "minimum_aspect_ratio": 0.3, "maximum_aspect_ratio": 4.0}
    return world.load(entry, stages=(1,), max_rejected_share=1.0, **keys)


def sheet(index: Artifact) -> bytes:
    return (index.path / image_index.SHEET).read_bytes()


def test_x(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(world)
    world.add("kill.png", scene(1))
    monkeypatch.setattr(image_index, "_look", killed_by_name)
    index = world.index(load(world))
    print(index.summary)
    Path("/tmp/rejected.png").write_bytes(sheet(index))
    from tasks.publish import data_uri
    import base64
    Path("/tmp/rejected.jpg").write_bytes(base64.b64decode(data_uri(index.path / "rejected.png").split(",")[1]))
