"""A data set that changes: only what is new is read, judged and decoded, and nothing that is there is rewritten.

The other computation is always the same one: a build of the present pictures in a workspace that has no past.
"""

import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifact_rows import live_rows
from data_world import DataWorld
from PIL import Image

from deepfloyd_core import files
from deepfloyd_core.config.run import Run
from deepfloyd_core.index import captions
from deepfloyd_core.index import scan as scans
from deepfloyd_core.index.identity import index_request
from deepfloyd_core.index.index import Block, build_index, judge_block
from deepfloyd_core.index.ledger import INDEX_FILE
from deepfloyd_core.index.scan import scan
from deepfloyd_core.sources import columns
from deepfloyd_core.sources import folder as local_folder
from deepfloyd_core.store.artifacts import Artifact, WorkDir, verify_artifact
from deepfloyd_core.training.batches import BatchOrder, TrainingRows


@pytest.fixture(autouse=True)
def _trust_young_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_folder, "RACY_NS", 0)  # a test does not wait for two seconds before each scan


def noise(seed: int, width: int = 70, height: int = 66) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def without_past(world: DataWorld, run: Run, **keys: Any) -> list[dict[str, Any]]:
    """The rows of the same pictures, built where nothing is there to be taken over."""
    fresh = world.load(*keys.pop("entries", ()), workspace=str(world.folder / "fresh"), **keys)
    rows = live_rows(world.pixels(fresh, world.index(fresh), 1))
    shutil.rmtree(world.folder / "fresh")
    return rows


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are read whole from now on."""
    names: list[str] = []
    for method in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, method, recorded(getattr(Path, method), names))
    monkeypatch.setattr(files, "_at_once", recorded(files._at_once, names))
    return names


def recorded(real: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """A function of a path that also notes the path's name."""

    def method(path: Path | str, *arguments: Any, **options: Any) -> Any:
        names.append(Path(path).name)
        return real(path, *arguments, **options)

    return method


# ---- the scan ---------------------------------------------------------------------------------------------------------


def test_a_scan_in_blocks_is_the_scan_at_once(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        world.add(f"{number}.png", noise(number), f"caption {number}" if number % 3 else None)
    for strategy in ("textfile", "filename"):
        whole = scan(world.load({"caption_strategy": strategy}, stages=(1,)))
        with monkeypatch.context() as small:
            for module in (columns, scans):
                small.setattr(module, "LISTED_BLOCK", 2)
            for module, name in ((scans, "BLOCK"), (captions, "_AT_ONCE")):
                small.setattr(module, name, 2)
            run = world.load(
                {"caption_strategy": strategy}, stages=(1,), workspace=str(world.folder / f"new {strategy}")
            )
            assert scan(run).equals(whole) and whole.num_rows == 7


def test_a_second_scan_reads_no_file_and_finds_the_same(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        world.add(f"deep/{number}.png", noise(number), f"caption {number}")
    world.add("no_caption.png", noise(9), caption=None)
    run = world.load(stages=(1,))
    first = scan(run)
    read = reads(monkeypatch)
    assert scan(run).equals(first)
    assert not read


@pytest.mark.parametrize("harm", ["gone", "garbage", "half", "other columns"])
def test_notes_that_are_lost_or_damaged_change_nothing(world: DataWorld, harm: str) -> None:
    for number in range(3):
        world.add(f"{number}.png", noise(number))
    run = world.load(stages=(1,))
    first = scan(run)
    (notes,) = (run.workspace / ".scan").iterdir()
    if harm == "gone":
        notes.unlink()
    elif harm == "garbage":
        notes.write_bytes(b"garbage" * 99)
    elif harm == "half":
        notes.write_bytes(notes.read_bytes()[: notes.stat().st_size // 2])
    else:
        with pa.ipc.new_file(notes, pa.schema([("x", pa.int64())])) as writer:
            writer.write_table(pa.table({"x": [1]}))
    assert scan(run).equals(first)


def test_a_flipped_bit_anywhere_in_the_notes_is_found_and_every_file_is_read_again(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        world.add(f"{number}.png", noise(number), "a purple star")
    run = world.load(stages=(1,))
    first = scan(run)
    (notes,) = (run.workspace / ".scan").iterdir()
    good, times = notes.read_bytes(), notes.stat()
    sha256, caption = first["sha256"][1].as_py().encode(), b"a purple star"
    for place in (*range(0, len(good), 61), good.index(sha256) + 5, good.index(caption) + 2, len(good) - 9):
        notes.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        os.utime(notes, ns=(times.st_atime_ns, times.st_mtime_ns))
        caplog.clear()
        assert scan(run).equals(first), f"byte {place} flipped"
        assert f"{notes} has no seal that fits its bytes: it is made anew" in caplog.text
        assert notes.read_bytes() == good
    read = reads(monkeypatch)
    assert scan(run).equals(first) and not read


def test_what_a_killed_run_left_of_its_notes_goes_with_the_next_ones(world: DataWorld) -> None:
    world.add("a.png", noise(0))
    run = world.load(stages=(1,))
    scan(run)
    (notes,) = (run.workspace / ".scan").iterdir()
    notes.with_name(f".tmp-12345-{notes.name}").write_bytes(b"half")
    other = notes.with_name(".tmp-12345-of another data set.arrow")
    other.write_bytes(b"half")
    notes.unlink()
    scan(run)
    assert set(notes.parent.iterdir()) == {notes, other}


def test_a_file_that_changed_is_read_again_even_with_its_old_size_and_time(world: DataWorld) -> None:
    path = world.add("a.bmp", noise(0))
    world.add("b.bmp", noise(1))
    run = world.load(stages=(1,))
    first = scan(run).to_pylist()
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    second = scan(run).to_pylist()
    assert second[0]["sha256"] != first[0]["sha256"] and second[1] == first[1]


def test_a_caption_that_changed_comes_or_goes_is_seen(world: DataWorld) -> None:
    path = world.add("a.png", noise(0), "one")
    run = world.load(stages=(1,))

    def captions() -> list[str]:
        texts: list[str] = scan(run)["captions"][0].as_py()
        return texts

    assert captions() == ["one"]
    path.with_suffix(".txt").write_text("two")
    assert captions() == ["two"]
    path.with_suffix(".txt").unlink()
    assert captions() is None
    path.with_suffix(".txt").write_text("three")
    assert captions() == ["three"]


def test_a_file_that_no_memory_holds_is_a_row(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.add("a.png", noise(0))
    for name in ("huge.png", "backup", "disk.iso"):
        with (world.folder / "pictures" / name).open("wb") as handle:
            handle.truncate(20 << 30)
    world.add("much.png", noise(1))
    read, real = [], files._at_once

    def opened(path: str, flags: int) -> int:
        read.append(Path(path).name)
        if read[-1] == "much.png":
            raise MemoryError
        return real(path, flags)

    monkeypatch.setattr(files, "_at_once", opened)
    rows = {row["source"]: (row["reason"], row["detail"]) for row in scan(world.load(stages=(1,))).to_pylist()}
    assert rows == {
        "a.png": (None, None),
        "huge.png": ("unreadable", "larger than 1,024 MiB"),
        "much.png": ("unreadable", "does not fit into the memory that is left"),
    }
    assert {"huge.png", "backup", "disk.iso"}.isdisjoint(read)


def test_a_caption_that_could_not_be_read_once_is_read_by_the_next_run(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        world.add(f"{name}.png", noise(ord(name)), f"caption {name}")
    run = world.load(stages=(1,))
    real = files._at_once
    broken = [True]

    def opened(path: str, flags: int) -> int:
        if broken[0] and path.endswith("b.txt"):
            raise OSError(5, "Input/output error", path)
        return real(path, flags)

    monkeypatch.setattr(files, "_at_once", opened)
    assert scan(run)["captions"].to_pylist() == [["caption a"], None]
    broken[0] = False
    assert scan(run)["captions"].to_pylist() == [["caption a"], ["caption b"]]


def test_captions_of_another_strategy_are_not_taken_for_the_texts_beside_the_pictures(world: DataWorld) -> None:
    world.add("a name.png", noise(0), "a text")

    def captions(**keys: Any) -> list[list[str]]:
        texts: list[list[str]] = scan(world.load(keys, stages=(1,)))["captions"].to_pylist()
        return texts

    for _ in range(2):
        assert captions(caption_strategy="filename") == [["a name"]]
        assert captions(caption_strategy="textfile") == [["a text"]]
        prompts = {"caption_strategy": "textfile", "instance_prompt": "sks", "only_instance_prompt": True}
        assert captions(**prompts) == [["sks"]]


@pytest.mark.parametrize("harm", ["pipe", "link out of the root", "no longer readable"])
def test_of_a_picture_that_became_something_else_nothing_is_remembered(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    path = world.add("a.png", noise(0), "a text")
    world.add("b.png", noise(1))
    run = world.load(stages=(1,))
    scan(run)
    path.unlink()
    if harm == "pipe":
        os.mkfifo(path)
    elif harm == "link out of the root":
        path.symlink_to("/etc/hostname")
    else:
        path.write_bytes(b"new")
        real = files._at_once

        def refusing(path: str, flags: int) -> int:
            if path.endswith("a.png"):
                raise PermissionError
            return real(path, flags)

        monkeypatch.setattr(files, "_at_once", refusing)
    row = scan(run).to_pylist()[0]
    assert (row["source"], row["sha256"], row["captions"]) == ("a.png", None, None)
    with_notes = scan(run)
    shutil.rmtree(run.workspace / ".scan")
    assert scan(run).equals(with_notes)


def test_the_order_of_the_data_sets_in_their_file_changes_no_row(world: DataWorld) -> None:
    entries = []
    for name in ("one", "two"):
        folder = world.folder / name
        folder.mkdir()
        for number in range(3):
            Image.fromarray(noise(number + len(name) * ord(name[0]))).save(folder / f"{number}.png")
        entries.append({"id": name, "instance_data_dir": str(folder), "caption_strategy": "filename"})
    rows = []
    for order in (entries, entries[::-1]):
        run = world.load(*order, stages=(1,))
        rows.append(live_rows(world.pixels(run, world.index(run), 1)))
        shutil.rmtree(run.workspace)
    assert rows[0] == rows[1]


def test_a_young_file_is_not_trusted(world: DataWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_folder, "RACY_NS", 60 * 10**9)
    world.add("a.png", noise(0))
    run = world.load(stages=(1,))
    first = scan(run)
    read = reads(monkeypatch)
    assert scan(run).equals(first)
    assert sorted(read) == ["a.png", "a.txt"]


# ---- the index --------------------------------------------------------------------------------------------------------


def test_only_new_pictures_are_judged_and_the_ledger_is_that_of_a_first_run(world: DataWorld) -> None:
    for number in range(6):
        world.add(f"{number}.png", noise(number))
    world.add("small.png", noise(7, 30, 30))
    world.add("broken.jpg", b"broken")
    keys: dict[str, Any] = {"stages": (1,), "max_rejected_share": 0.9}
    first = world.index(world.load(**keys))
    assert (first.manifest.summary["judged_now"], first.manifest.summary["judged_before"]) == (8, 0)
    world.add("new.png", noise(10))
    world.add("new_small.png", noise(11, 20, 90))
    (world.folder / "pictures" / "2.png").unlink()
    world.add("3.png", noise(33))
    (world.folder / "pictures" / "4.txt").write_text("another caption")
    second = world.index(world.load(**keys))
    assert (second.manifest.summary["judged_now"], second.manifest.summary["judged_before"]) == (3, 6), (
        "two came, one changed"
    )
    fresh = world.index(world.load(**keys, workspace=str(world.folder / "fresh")))
    assert (fresh.path / "index.parquet").read_bytes() == (second.path / "index.parquet").read_bytes()


@pytest.mark.parametrize("file", ["looks.npy", "index.parquet"])
@pytest.mark.parametrize("harm", ["gone", "empty", "half", "a flipped bit", "of fewer rows"])
def test_a_damaged_index_costs_the_judging_and_no_more(world: DataWorld, file: str, harm: str) -> None:
    for number in range(3):
        world.add(f"{number}.png", noise(number))
    path = world.index(world.load(stages=(1,))).path / file
    data = path.read_bytes()
    path.unlink()
    if harm == "of fewer rows" and file == "looks.npy":
        np.save(path, np.zeros((1, 8), np.uint8))
    elif harm == "a flipped bit":
        place = data.index(b"1.png") if file == "index.parquet" else len(data) - 3
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
    elif harm != "gone":
        path.write_bytes(data[: len(data) // 2 if harm == "half" else 0])
    world.add("new.png", noise(9))
    run = world.load(stages=(1,))
    index = world.index(run)
    assert (index.manifest.summary["judged_now"], index.manifest.summary["accepted"]) == (4, 4)


def test_what_is_odd_about_a_file_is_kept_while_its_caption_comes_and_goes(world: DataWorld) -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(0)).save(whole, "JPEG")
    world.add("a.jpg", whole.getvalue()[:-2], caption=None)
    world.add("b.png", noise(1))
    world.index(world.load(stages=(1,), max_rejected_share=0.5))
    (world.folder / "pictures" / "a.txt").write_text("a caption")
    index = world.index(world.load(stages=(1,), max_rejected_share=0.5))
    assert index.manifest.summary["judged_now"] == 0
    notes = {row["source"]: row["note"] for row in pq.read_table(index.path / "index.parquet").to_pylist()}
    fresh = world.index(world.load(workspace=str(world.folder / "fresh"), stages=(1,), max_rejected_share=0.5))
    assert fresh.manifest.summary["judged_now"] == 2 and fresh.fingerprint == index.fingerprint
    assert (fresh.path / "index.parquet").read_bytes() == (index.path / "index.parquet").read_bytes()
    assert notes == {"a.jpg": "lacks the mark of its end, and nothing else", "b.png": None}


def test_other_captions_judge_no_picture_again_and_other_sizes_judge_all(world: DataWorld) -> None:
    for number in range(4):
        world.add(f"{number}.png", noise(number, 70, 65 + number))
    assert world.index(world.load(stages=(1,))).manifest.summary["judged_now"] == 4
    named = world.index(world.load({"caption_strategy": "filename"}, stages=(1,)))
    assert named.manifest.summary["judged_now"] == 0
    larger = world.index(world.load({"minimum_image_size": 67}, stages=(1,), max_rejected_share=1.0, num_eval_images=1))
    assert larger.manifest.summary["judged_now"] == 4 and larger.manifest.summary["reasons"] == {"too_small": 2}


# ---- the pixels -------------------------------------------------------------------------------------------------------


def shards(pixels: Artifact) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in pixels.path.glob("*.parquet")}


def test_added_and_removed_pictures_touch_no_finished_shard(world: DataWorld) -> None:
    entry = {"crop_style": "random", "repeats": 1}
    keys: dict[str, Any] = {"stages": (1,), "shard_mib": 0.1}  # 8 rows a shard
    for number in range(16):
        world.add(f"{number}.png", noise(number, 500))
    run = world.load(entry, **keys)
    first = world.pixels(run, world.index(run), 1)
    before = shards(first)
    assert len(before) == 4 and first.manifest.summary["decoded"] == 16
    world.add("35.png", noise(35, 500))
    (world.folder / "pictures" / "7.png").unlink()
    second = world.pixels(run, world.index(run), 1)
    after = shards(second)
    assert second.manifest.summary["decoded"] == 1
    assert set(before) <= set(after) and all(after[name] == before[name] for name in before), "linked, not copied"
    assert len(after) == 5
    rows = live_rows(second)
    assert rows == without_past(world, run, entries=[entry], **keys)
    assert "7.png" not in {row["source"] for row in rows} and len(rows) == 32
    assert verify_artifact(second) == []
    shutil.rmtree(first.path)
    assert verify_artifact(second) == [] and live_rows(second) == rows, "it needs no older version"


def test_a_changed_caption_rebuilds_the_rows_of_its_picture(world: DataWorld) -> None:
    for number in range(4):
        world.add(f"{number}.png", noise(number))
    run = world.load(stages=(1,))
    world.pixels(run, world.index(run), 1)
    (world.folder / "pictures" / "1.txt").write_text("something else")
    second = world.pixels(run, world.index(run), 1)
    assert second.manifest.summary["decoded"] == 1
    assert live_rows(second) == without_past(world, run, stages=(1,))


def test_a_file_that_is_rejected_leaves_the_crops_and_the_eval_set_what_they_are(world: DataWorld) -> None:
    for number in range(4):
        world.add(f"{number}.png", noise(number))
    run = world.load(stages=(1,), max_rejected_share=0.9)
    index = world.index(run)
    first = world.pixels(run, index, 1), world.eval_set(run, index)
    world.add("broken.png", b"no picture")
    second = world.index(run)
    assert second.fingerprint != index.fingerprint
    assert (world.pixels(run, second, 1), world.eval_set(run, second)) == first


def test_many_small_shards_are_put_together_without_decoding(world: DataWorld) -> None:
    world.add("0.png", noise(0))
    world.add("1.png", noise(1))
    run = world.load(stages=(1,), shard_mib=1)
    counts = []
    for number in range(2, 14):
        world.add(f"{number}.png", noise(number))
        pixels = world.pixels(run, world.index(run), 1)
        assert pixels.manifest.summary["decoded"] == (3 if number == 2 else 1)
        counts.append(len(shards(pixels)))
    assert max(counts) <= 9 and min(counts[1:]) < max(counts), counts
    assert live_rows(pixels) == without_past(world, run, stages=(1,), shard_mib=1)


def test_a_shard_with_few_live_rows_is_left_behind(world: DataWorld) -> None:
    for number in range(8):
        world.add(f"{number}.png", noise(number))
    run = world.load(stages=(1,))
    (before,) = shards(world.pixels(run, world.index(run), 1))
    for number in range(5):
        (world.folder / "pictures" / f"{number}.png").unlink()
    pixels = world.pixels(run, world.index(run), 1)
    (after,) = shards(pixels)
    assert after != before and pixels.manifest.summary["decoded"] == 0
    assert live_rows(pixels) == without_past(world, run, stages=(1,))


@pytest.mark.parametrize("harm", ["flipped", "gone", "cut"])
def test_nothing_is_taken_over_from_a_damaged_shard(world: DataWorld, harm: str) -> None:
    for number in range(18):
        world.add(f"{number}.png", noise(number))
    run = world.load(stages=(1,), shard_mib=0.1)
    first = world.pixels(run, world.index(run), 1)
    victim = sorted(first.path.glob("*.parquet"))[0]
    lost = pq.read_metadata(victim).num_rows
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.unlink()
    if harm != "gone":
        victim.write_bytes(data if harm == "flipped" else data[: len(data) // 2])
    world.add("new.png", noise(10))
    second = world.pixels(run, world.index(run), 1)
    assert second.manifest.summary["decoded"] == lost + 1, "the new picture and those of the damaged shard"
    assert live_rows(second) == without_past(world, run, stages=(1,), shard_mib=0.1)
    assert verify_artifact(second) == []


def changes(world: DataWorld, rng: np.random.Generator) -> Iterator[None]:
    """Add, remove and change pictures and captions at random."""
    names = [f"{number}.png" for number in range(12)]
    folder = world.folder / "pictures"
    for _ in range(12):
        for name in rng.choice(names, rng.integers(1, 6), replace=False):
            kind = rng.integers(4)
            if kind == 0 and (folder / name).exists() and len(list(folder.glob("*.png"))) > 4:
                (folder / name).unlink()
            elif kind == 1 and (folder / name).exists():
                (folder / name).with_suffix(".txt").write_text(f"caption {rng.integers(3)}")
            else:
                world.add(name, noise(int(rng.integers(40)), int(rng.integers(64, 160)), 70), f"c{rng.integers(3)}")
        yield


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_after_any_history_the_rows_and_the_batches_are_those_of_a_first_run(world: DataWorld, seed: int) -> None:
    entry = {"crop_style": "random", "crop_aspect": "preserve", "repeats": 1}
    keys: dict[str, Any] = {"stages": (1,), "shard_mib": 0.1}
    for number in range(6):
        world.add(f"{number}.png", noise(number))
    run = world.load(entry, **keys)
    fresh = world.load(entry, workspace=str(world.folder / "fresh"), **keys)
    for _ in changes(world, np.random.default_rng(seed)):
        pixels = world.pixels(run, world.index(run), 1)
        alone = world.pixels(fresh, world.index(fresh), 1)
        assert pixels.fingerprint == alone.fingerprint
        assert live_rows(pixels) == live_rows(alone)
        batches = []
        for made in (pixels, alone):
            rows = TrainingRows(made, frozenset())
            order = BatchOrder(tuple(rows.counts.items()), 3, 7)
            batches.append([rows.take(*order.batch(number)) for number in range(5)])
        for one, other in zip(*batches, strict=True):
            assert one.pixels.equal(other.pixels) and one.caption_ids == other.caption_ids
            assert np.array_equal(one.rows, other.rows)
        shutil.rmtree(world.folder / "fresh")


def test_the_data_s_fingerprint_is_that_of_a_scan_without_notes(world: DataWorld) -> None:
    for number in range(6):
        world.add(f"{number}.png", noise(number))
    run = world.load(stages=(1,))
    scan(run)
    for _ in changes(world, np.random.default_rng(0)):
        with_notes = index_request(run, scan(run)).fingerprint
        shutil.rmtree(run.workspace / ".scan")
        assert index_request(run, scan(run)).fingerprint == with_notes


def test_blocks_that_are_judged_elsewhere_give_the_same_ledger(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the workers of a cluster do: from the block's place in the scan; those with a verdict on all files stay here."""
    monkeypatch.setattr("deepfloyd_core.index.index.BLOCK", 2)
    for number in range(5):
        world.add(f"{number}.png", np.full((300, 300, 3), 40 * number, np.uint8))
    run = world.load()
    scanned, seen = scan(run), list[int]()

    def elsewhere(blocks: Sequence[Block]) -> None:
        for block in blocks:
            seen.append(block.start)
            judge_block(run, scanned[block.start : block.start + block.count], block, world.children)

    made = []
    for judge_all in (None, elsewhere):
        work = WorkDir(run.workspace / "image_index" / f"by-{judge_all is None}", 0)
        work.path.mkdir(parents=True)
        build_index(run, scanned, world.children, work, elsewhere=judge_all)
        made.append((work.path / INDEX_FILE).read_bytes())
    assert made[0] == made[1] and seen == [0, 2, 4]
