"""The contact sheet of rejected pictures: a few for each reason, safely decoded, the same bytes however it was made."""

import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from child_functions import killed, killed_by_name
from data_world import DataWorld
from PIL import Image, ImageDraw, ImageFile

from deepfloyd_core.config.run import Run
from deepfloyd_core.index import index as image_index
from deepfloyd_core.index import rejected, sheets
from deepfloyd_core.index.ledger import BEYOND, SCHEMA
from deepfloyd_core.pictures.decode import decode_what_is_there
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.sheets import fitted, font
from deepfloyd_core.processes.pool import Children, Limits
from deepfloyd_core.store.artifacts import Artifact


def scene(seed: int, width: int = 300, height: int = 220) -> Image.Image:
    """A picture in which one sees how much of it is there."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([across, down, np.full_like(across, 128)], -1).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
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


def fill(world: DataWorld) -> None:
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
    world.add("bombs/large.png", bomb())
    world.add("silent/no caption.png", scene(5), caption=None)
    os.mkfifo(world.folder / "pictures" / "pipe.jpg")
    (world.folder / "pictures" / "link.jpg").symlink_to("/etc/hostname")
    (world.folder / "pictures" / os.fsdecode(b"broken \xff name.jpg")).write_bytes(b"x")


def bomb() -> bytes:
    """The header of a PNG of 400 megapixels."""
    size = (20_000).to_bytes(4, "big")
    chunk = b"IHDR" + size * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + b"IEND"


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def load(world: DataWorld, **keys: Any) -> Run:
    entry = {"crop": True, "crop_aspect": "preserve", "minimum_aspect_ratio": 0.3, "maximum_aspect_ratio": 4.0}
    return world.load(entry, stages=(1,), max_rejected_share=1.0, **keys)


def sheet(index: Artifact) -> bytes:
    return (index.path / sheets.SHEET).read_bytes()


def test_the_sheet_does_not_depend_on_workers_or_kills(
    world: DataWorld, new_world: Callable[[Path], DataWorld], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(world)
    index = world.index(load(world))
    first = sheet(index)
    assert len(index.manifest.summary["reasons"]) == 9
    monkeypatch.setattr(image_index, "BLOCK", 10)
    with Children(1, Limits(), ("deepfloyd_core.index.index",)) as alone:
        one = type(world)(world.folder, alone)
        assert sheet(one.index(load(one, workspace=str(world.folder / "one")))) == first
    run = load(world, workspace=str(world.folder / "broken"))
    for name in ("choose", "draw", "save_picture"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sheets, name, interrupted)
            world.index(run)
    assert sheet(world.index(run)) == first


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_nothing_rejected_is_no_file(world: DataWorld) -> None:
    for number in range(3):
        world.add(f"{number}.png", scene(number))
    assert not (world.index(world.load(stages=(1,))).path / sheets.SHEET).exists()
    limited = world.index(world.load({"max_num_samples": 2}, stages=(1,)))
    assert limited.manifest.summary["rejected"] == 1
    assert not (limited.path / sheets.SHEET).exists(), "left out as asked is nothing to look into"


def test_a_sheet_that_an_interrupted_build_left_goes_with_its_rejects(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("0.png", scene(0))
    world.add("1.png", scene(1))
    run = world.load(stages=(1,), max_rejected_share=1.0)
    (stale,) = [world.index(run).path / sheets.SHEET]
    (stale.parent / "manifest.json").unlink()
    stale.write_bytes(b"of pictures that took too long then")
    assert not (world.index(run).path / sheets.SHEET).exists()


def test_only_what_is_shown_is_decoded_again_and_nothing_that_harms(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        world.add(f"{number}.png", scene(number, 30, 30))
    world.add("good.png", scene(0))
    for name in ("kill.png", "crash.png"):
        world.add(name, scene(2))
    monkeypatch.setattr(image_index, "look_at", killed_by_name)
    asked: list[str] = []
    real = Children.map

    def noted(self: Children, function: Callable[..., object], items: Iterable[Any]) -> Iterator[object]:
        items = list(items)
        if function is sheets.thumbnail:
            asked.extend(row.source for _, row in items)
        return real(self, function, items)

    monkeypatch.setattr(Children, "map", noted)
    world.index(load(world))
    assert len(asked) == rejected.MAX_SHOWN - 2
    assert not {"kill.png", "crash.png", "good.png"} & set(asked)


def test_a_picture_that_kills_while_it_is_drawn_is_a_grey_cell(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("good.png", scene(0))
    world.add("small.png", Image.new("RGB", (30, 30), (255, 0, 0)))
    monkeypatch.setattr(sheets, "thumbnail", killed)
    picture = Image.open(io.BytesIO(sheet(world.index(load(world)))))
    colours = {colour for _, colour in picture.getcolors(1 << 20) or []}
    assert (198, 198, 198) in colours and (255, 0, 0) not in colours


def test_rare_reasons_are_shown_beside_frequent_ones_and_stay_as_others_come(tmp_path: Path) -> None:
    def chosen(count: int) -> list[rejected.Rejected]:
        reasons = {"too_small": count, "corrupt": 5, "truncated": 1, "beyond_max_num_samples": 3}
        row = {"dataset_id": "set", "captions": [], "bytes": 1, "status": "rejected"}
        names = [(reason, number) for reason, many in reasons.items() for number in range(many)]
        rows = [row | {"reason": reason, "source": f"{reason} {number}"} for reason, number in names]
        good = {**row, "status": "accepted", "source": "good"}
        table = pa.Table.from_pylist([*rows, good], schema=SCHEMA)
        pq.write_table(table, tmp_path / "ledger", row_group_size=100)
        return rejected.choose(tmp_path / "ledger", (BEYOND,))

    few, many = chosen(1000), chosen(70_000)
    assert Counter(row.reason for row in few) == {"corrupt": 5, "too_small": 26, "truncated": 1}
    assert [row.reason for row in few] == sorted(row.reason for row in few)
    assert [row for row in few if row.reason != "too_small"] == [row for row in many if row.reason != "too_small"]
    assert len(many) == rejected.MAX_SHOWN
    only = chosen(0)
    assert Counter(row.reason for row in only) == {"corrupt": 5, "truncated": 1}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_of_a_cut_picture_what_is_there_is_shown(kind: str) -> None:
    data = encoded(scene(0), kind, interlace=0)
    whole = np.asarray(decode_what_is_there(data, 100), int)
    half = np.asarray(decode_what_is_there(data[: len(data) // 2], 100), int)
    assert half.shape == whole.shape == (73, 100, 3)
    assert np.abs(half[:15:8] - whole[:15:8]).mean() < 8 < np.abs(half - whole).mean()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_what_is_no_picture_has_nothing_to_show() -> None:
    with pytest.raises(Unreadable):
        decode_what_is_there(b"no picture", 100)
    with pytest.raises(Unreadable):
        decode_what_is_there(bomb(), 100)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    "name",
    ["a\nb.png", "\u202egnp.exe", "\u0000\u200f", "图片" * 900, "w" * 4000, "", "e\u0301" * 60, "\U0001f600.png"],
)
@pytest.mark.parametrize("keep_end", [True, False])
def test_any_name_fits_in_one_line_of_plain_signs(name: str, keep_end: bool) -> None:
    text = fitted(name, 144, 12, keep_end)
    assert text.isascii() and text.isprintable() and font(12).getlength(text) <= 144
    assert len(text) > 10 or len(name) < 10


def test_the_end_of_a_long_name_is_kept_when_asked() -> None:
    long = "folder/" * 100 + "IMG_2031.jpg"
    assert fitted(long, 144, 12, keep_end=True).endswith("IMG_2031.jpg")
    assert fitted(long, 144, 12).startswith("folder/")
    assert fitted("short", 144, 12) == fitted("short", 144, 12, keep_end=True) == "short"
