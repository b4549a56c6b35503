"""Pictures made to harm the reader: each costs its own row of the ledger, and nothing else."""

import io
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_functions import crop_of, hangs_by_name, killed_by_name
from data_world import DataWorld
from PIL import Image

import deepfloyd_core.index.index as image_index
from deepfloyd_core.config.run import Run
from deepfloyd_core.errors import DataError
from deepfloyd_core.index.ledger import read_index
from deepfloyd_core.index.older_verdicts import older_verdicts
from deepfloyd_core.pictures import resize as shrink
from deepfloyd_core.pictures.decode import decode_rgb
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.processes.pool import Children, Limits


def good(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (80, 90, 3), dtype=np.uint8)


def png(width: int, height: int) -> bytes:
    """A PNG of one colour, small on disk and as large as it says in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    lines = zlib.compress(bytes(height * (1 + 3 * width)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def reasons(world: DataWorld, run: Run) -> dict[str, str | None]:
    return {row.source: row.reason for row in read_index(world.index(run))}


def test_a_picture_that_takes_too_much_memory_is_a_row(
    world: DataWorld, new_world: Callable[[Path], DataWorld]
) -> None:
    for number in range(5):
        world.add(f"{number}.png", good(number))
    world.add("large.png", png(9000, 9000))
    run = world.load(stages=(1,))
    with Children(2, Limits(memory_mib=128), ("deepfloyd_core.index.index",)) as small:
        found = reasons(type(world)(world.folder, small), run)
    assert found.pop("large.png") == "out_of_memory"
    assert set(found.values()) == {None}


HASTE_S = 1.5  # what hangs is lost after it; no other picture takes as long, also on a busy machine


def test_a_picture_that_takes_too_long_is_a_row_and_is_tried_again_later(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        world.add(f"{number}.png", good(number))
    world.add("slow.png", good(5))
    run = world.load(stages=(1,))
    with (
        monkeypatch.context() as patched,
        Children(1, Limits(seconds=HASTE_S), ("deepfloyd_core.index.index", "child_functions")) as hasty,
    ):
        patched.setattr(image_index, "look_at", hangs_by_name)
        found = reasons(type(world)(world.folder, hasty), run)
    assert found.pop("slow.png") == "timeout"
    assert set(found.values()) == {None}
    world.add("another.png", good(9))
    assert set(reasons(world, run).values()) == {None}, "with more time it is good"


def test_a_picture_that_took_too_long_is_tried_again_with_more_time_and_only_then(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add("a.png", good(0))
    world.add("slow.png", good(5))
    hastily: dict[str, Any] = {"stages": (1,), "decode_timeout_s": HASTE_S, "max_rejected_share": 0.5}
    with (
        monkeypatch.context() as patched,
        Children(1, Limits(seconds=HASTE_S), ("deepfloyd_core.index.index", "child_functions")) as hasty,
    ):
        patched.setattr(image_index, "look_at", hangs_by_name)
        late = type(world)(world.folder, hasty)
        first = late.index(late.load(**hastily))
    assert first.manifest.summary["reasons"] == {"timeout": 1}
    assert world.index(world.load(**hastily)) == first
    more = world.load(stages=(1,), decode_timeout_s=50.0)
    index = world.index(more)
    assert index.manifest.summary["reasons"] == {} and index.manifest.summary["judged_now"] == 1
    assert world.index(more) == index


def test_pictures_that_kill_the_decoder_cost_one_row_each(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_index, "look_at", killed_by_name)
    names = [f"{number}.png" for number in range(30)]
    names[3], names[17], names[18] = "kill.png", "crash.png", "kill again.png"
    for number, name in enumerate(names):
        world.add(name, good(number))
    found = reasons(world, world.load(stages=(1,)))
    lost = {name for name, reason in found.items() if reason == "killed_decoder"}
    assert lost == {"kill.png", "crash.png", "kill again.png"}
    assert {reason for name, reason in found.items() if name not in lost} == {None}


def flat(kind: str, mode: str, edge: int) -> bytes:
    """A picture of one colour."""
    out = io.BytesIO()
    Image.new(mode, (edge, edge), 200 if mode == "L" else (200, 200, 200, 99)[: len(mode)]).save(
        out, kind, compress_level=1
    )
    return out.getvalue()


def test_a_picture_that_is_said_to_fit_is_judged_within_that_memory(world: DataWorld) -> None:
    world.add("flat.png", flat("PNG", "RGB", 4800))
    world.add("clear.png", flat("PNG", "RGBA", 4800))
    world.add("open.jpg", flat("JPEG", "RGB", 4800)[:-2])
    run = world.load(stages=(1,), decode_memory_mib=256)
    with Children(1, Limits(memory_mib=256), ("deepfloyd_core.index.index",)) as small:
        found = reasons(type(world)(world.folder, small), run)
    assert set(found.values()) == {None}


def test_a_picture_that_is_said_to_fit_is_cropped_within_that_memory() -> None:
    pictures = [flat("PNG", mode, 4800) for mode in ("RGBA", "RGB")]
    with Children(1, Limits(memory_mib=256), ("child_functions",)) as small:
        assert list(small.map(crop_of, pictures)) == [(80, 64, 3)] * 2


def test_only_one_worker_at_a_time_has_a_large_picture_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "LARGE_PX", 100 * 100)
    lock, held, most = threading.Lock(), [0, 0], [0]
    real = decode_rgb

    @contextmanager
    def alone() -> Iterator[None]:
        with lock:
            held[0] += 1
            yield
            held[1] += 1

    def decode(data: bytes) -> Image.Image:
        most[0] = max(most[0], held[0] - held[1])
        assert lock.locked()
        return real(data)

    monkeypatch.setattr(shrink, "decode_rgb", decode)
    with ThreadPoolExecutor(4) as pool:
        data = flat("BMP", "RGB", 101)
        list(pool.map(lambda _: shrink.take_crops(data, [((90, 90), (0, 0, 64, 64))] * 2, alone), range(20)))
    assert (held, most) == ([20, 20], [1])
    monkeypatch.setattr(shrink, "decode_rgb", real)
    shrink.take_crops(flat("BMP", "RGB", 100), [((90, 90), (0, 0, 64, 64))], alone)
    assert held == [20, 20], "and a small one waits for nobody"


@pytest.mark.parametrize("failure", [MemoryError(), Unreadable("out_of_memory", "90x80 px do not fit")])
def test_a_crop_that_does_not_fit_into_memory_is_one_clear_error(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    world.add("a.bmp", good(0))
    run = world.load(stages=(1,))
    index = world.index(run)

    def fails(_: bytes) -> None:
        raise failure

    monkeypatch.setattr(shrink, "decode_rgb", fails)
    with pytest.raises(DataError, match=r"a\.bmp cannot be cropped: out_of_memory, .*Lower decode_memory_mib"):
        world.pixels(run, index, 1)


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
def test_odd_names_are_pictures_like_others(world: DataWorld, name: str) -> None:
    world.add(name, good(0), "an odd one")
    world.add("plain.png", good(1))
    run = world.load(stages=(1,))
    index = world.index(run)
    assert {row.source: row.captions for row in read_index(index)}[name] == ["an odd one"]
    assert world.pixels(run, index, 1).manifest.summary["rows"] == 2


def test_a_name_of_4_kilobytes_below_many_folders_is_a_picture(world: DataWorld) -> None:
    deep = "/".join(["d" * 200] * 15)
    world.add(f"{deep}/a.png", good(0), "deep")
    world.add("b.png", good(1))
    run = world.load(stages=(1,))
    assert {row.source for row in read_index(world.index(run)) if row.status == "accepted"} == {
        f"{deep}/a.png",
        "b.png",
    }


def test_a_file_that_changes_while_it_is_read_is_a_row(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add("a.png", good(0))
    path = world.add("b.png", good(1))

    def changing(*arguments: Any) -> Any:
        path.write_bytes(png(70, 70))  # between the scan and the look
        return older_verdicts(*arguments)

    monkeypatch.setattr(image_index, "older_verdicts", changing)
    run = world.load(stages=(1,), max_rejected_share=0.5)
    assert reasons(world, run) == {"a.png": None, "b.png": "changed_while_reading"}


@pytest.mark.slow
def test_a_folder_of_a_hundred_thousand_entries_is_listed_in_seconds(world: DataWorld) -> None:
    import time

    from deepfloyd_core.index.scan import scan

    for number in range(100_000):
        (world.folder / "pictures" / f"{number}.jpg").write_bytes(b"x")
    run = world.load(stages=(1,))
    scan(run)
    started = time.monotonic()
    assert len(scan(run)) == 100_000
    assert time.monotonic() - started < 60  # a hang, not a measure of speed
