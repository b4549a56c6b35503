"""Pictures made to harm the reader: each costs its own row of the ledger, and nothing else."""

import zlib
from typing import Any

import numpy as np
import pytest
from child_functions import killed_by_name

import deepfloyd_core.image_index as image_index
from deepfloyd_core.children import Children, Limits
from deepfloyd_core.ledger import read_index


def good(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (80, 90, 3), dtype=np.uint8)


def png(width: int, height: int) -> bytes:
    """A PNG of one colour, small on disk and as large as it says in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    lines = zlib.compress(bytes(height * (1 + 3 * width)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def reasons(world: Any, run: Any) -> dict[str, str | None]:
    return {row.source: row.reason for row in read_index(world.index(run))}


def test_a_picture_that_takes_too_much_memory_is_a_row(world: Any, new_world: Any) -> None:
    for number in range(5):
        world.add(f"{number}.png", good(number))
    world.add("large.png", png(9000, 9000))
    run = world.load(stages=(1,))
    with Children(2, Limits(memory_mib=128), ("deepfloyd_core.image_index",)) as small:
        found = reasons(type(world)(world.folder, small), run)
    assert found.pop("large.png") == "out_of_memory"
    assert set(found.values()) == {None}


def test_a_picture_that_takes_too_long_is_a_row_and_is_tried_again_later(world: Any) -> None:
    for number in range(5):
        world.add(f"{number}.png", good(number))
    world.add("slow.png", png(9000, 9000))
    run = world.load(stages=(1,))
    with Children(1, Limits(seconds=0.1), ("deepfloyd_core.image_index",)) as hasty:
        found = reasons(type(world)(world.folder, hasty), run)
    assert found.pop("slow.png") == "timeout"
    assert set(found.values()) == {None}
    world.add("another.png", good(9))
    assert set(reasons(world, run).values()) == {None}, "with more time it is good"


def test_pictures_that_kill_the_decoder_cost_one_row_each(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_index, "_look", killed_by_name)
    names = [f"{number}.png" for number in range(30)]
    names[3], names[17], names[18] = "kill.png", "crash.png", "kill again.png"
    for number, name in enumerate(names):
        world.add(name, good(number))
    found = reasons(world, world.load(stages=(1,)))
    lost = {name for name, reason in found.items() if reason == "killed_decoder"}
    assert lost == {"kill.png", "crash.png", "kill again.png"}
    assert {reason for name, reason in found.items() if name not in lost} == {None}


@pytest.mark.parametrize(
    "name",
    [
        "line\nbreak.png",
        "\u202eright to left.png",
        "tab\t.png",
        "é" * 110 + ".png",
        "quote'\".png",
        "-rf.png",
        "$(x).png",
    ],
)
def test_odd_names_are_pictures_like_others(world: Any, name: str) -> None:
    world.add(name, good(0), "an odd one")
    world.add("plain.png", good(1))
    run = world.load(stages=(1,))
    index = world.index(run)
    assert {row.source: row.captions for row in read_index(index)}[name] == ["an odd one"]
    assert world.pixels(run, index, 1).summary["rows"] == 2


def test_a_name_of_4_kilobytes_below_many_folders_is_a_picture(world: Any) -> None:
    deep = "/".join(["d" * 200] * 15)
    world.add(f"{deep}/a.png", good(0), "deep")
    world.add("b.png", good(1))
    run = world.load(stages=(1,))
    assert {row.source for row in read_index(world.index(run)) if row.status == "accepted"} == {
        f"{deep}/a.png",
        "b.png",
    }


def test_a_file_that_changes_while_it_is_read_is_a_row(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add("a.png", good(0))
    path = world.add("b.png", good(1))
    older_verdicts = image_index._older_verdicts

    def changing(*arguments: Any) -> Any:
        path.write_bytes(png(70, 70))  # between the scan and the look
        return older_verdicts(*arguments)

    monkeypatch.setattr(image_index, "_older_verdicts", changing)
    run = world.load(stages=(1,), max_rejected_share=0.5)
    assert reasons(world, run) == {"a.png": None, "b.png": "changed_while_reading"}


@pytest.mark.slow
def test_a_folder_of_a_hundred_thousand_entries_is_listed_in_seconds(world: Any) -> None:
    import time

    from deepfloyd_core.scan import scan

    for number in range(100_000):
        (world.folder / "pictures" / f"{number}.jpg").write_bytes(b"x")
    run = world.load(stages=(1,))
    scan(run)
    started = time.monotonic()
    assert len(scan(run)) == 100_000
    assert time.monotonic() - started < 60  # a hang, not a measure of speed
