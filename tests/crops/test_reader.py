"""Every bit of a shard is checked by whoever reads it: a flipped one is found, or does not matter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_world import DataWorld
from flipped import flip, flipped, times_found

from deepfloyd_core.crops.eval_pictures import eval_pictures
from deepfloyd_core.crops.reader import crops_of
from deepfloyd_core.crops.rows import ROWS_FILE, read_row_list, shard_files
from deepfloyd_core.crops.shards import ShardRow, open_shard, read_rows
from deepfloyd_core.errors import DamagedError
from deepfloyd_core.store import manifest
from deepfloyd_core.store.artifacts import Artifact, damaged_parts, verify_artifact
from deepfloyd_core.store.damage import MARK

SIZE = (64, 64)
PIXEL_BYTES = 64 * 64 * 3


@pytest.fixture
def pixels(world: DataWorld) -> Artifact:
    """Three shards of eight rows."""
    return _pixels(world)


def _pixels(world: DataWorld, pictures: int = 24) -> Artifact:
    rng = np.random.default_rng(1)
    for number in range(pictures):
        world.add(f"{number}.png", rng.integers(0, 256, (80, 70, 3), np.uint8), f"caption {number}")
    run = world.load({"maximum_image_size": 64, "target_downsample_size": 64}, stages=(1,), shard_mib=0.1)
    return world.pixels(run, world.index(run), 1)


def _places(file: Path, pixel_flips: int, seed: int) -> list[int]:
    """Every third byte that is no pixel's, and some that are."""
    data, shard = file.read_bytes(), open_shard(file)
    starts = shard.starts(np.arange(len(shard)))
    is_pixel = np.zeros(len(data), bool)
    for start in starts:
        is_pixel[start : start + PIXEL_BYTES] = True
    chosen = np.random.default_rng(seed).choice(np.flatnonzero(is_pixel), pixel_flips, replace=False)
    return sorted([*np.flatnonzero(~is_pixel)[seed % 3 :: 3].tolist(), *chosen.tolist()])


def test_a_training_reads_no_flipped_bit_of_a_shard(pixels: Artifact) -> None:
    every = np.arange(len(read_row_list(pixels.path)))
    whole, files = crops_of(pixels).take(SIZE, every), shard_files(pixels)
    assert len(files) == 3
    places = _places(files[1], 60, 1)
    found = times_found(
        files[1], places, 1, lambda: crops_of(pixels).take(SIZE, every), lambda read: torch.equal(read, whole)
    )
    assert 60 <= found < len(places), "the texts beside the pixels are not read"


def test_the_other_readers_of_a_shard_use_no_flipped_bit_of_it(pixels: Artifact) -> None:
    file = shard_files(pixels)[0]
    whole = open_shard(file).all(), read_rows(file)

    def read() -> tuple[np.ndarray, list[ShardRow]]:
        return open_shard(file).all(), read_rows(file)

    def same(read: tuple[np.ndarray, list[ShardRow]]) -> bool:
        return np.array_equal(read[0], whole[0]) and read[1] == whole[1]

    places = _places(file, 40, 2)
    assert times_found(file, places, 2, read, same) == len(places)


def test_a_crop_that_is_damaged_names_its_file_its_row_and_what_mends_it(pixels: Artifact) -> None:
    crops, file = crops_of(pixels), shard_files(pixels)[2]
    rows = read_row_list(pixels.path)
    number = int(np.flatnonzero((rows["file"].to_numpy() == 2) & (rows["place"].to_numpy() == 3))[0])
    start = int(open_shard(file).starts(np.array([3]))[0])
    with flipped(file, start + 5000):
        crops.take(SIZE, np.delete(np.arange(len(rows)), number))
        with pytest.raises(DamagedError) as raised:
            crops.take(SIZE, np.array([0, number]))
    assert str(raised.value) == (
        f"{file} is damaged: row 3 has other pixels than were written. The next run that needs it makes it again."
    )


def test_held_out_pictures_are_checked_when_they_are_read(world: DataWorld) -> None:
    rng = np.random.default_rng(1)
    for number in range(6):
        world.add(f"{number}.png", rng.integers(0, 256, (80, 70, 3), np.uint8))
    run = world.load(stages=(1,), num_eval_images=3)
    held_out = world.eval_set(run, world.index(run))
    (file,) = shard_files(held_out)
    with (
        flipped(file, file.stat().st_size // 2),
        pytest.raises(DamagedError, match="has other bytes than its manifest says"),
    ):
        eval_pictures(held_out, 1)


def test_a_large_shard_that_a_reader_found_damaged_is_made_again_alone(
    world: DataWorld, pixels: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manifest, "_SMALL_ROWS", 0)
    files = shard_files(pixels)
    whole = {file.name: (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime_ns) for file in files}
    flip(files[1], files[1].stat().st_size // 2)
    assert _pixels(world).reused, "only sizes of large files are compared"
    with pytest.raises(DamagedError):
        crops_of(pixels).take(SIZE, np.arange(len(read_row_list(pixels.path))))
    assert (pixels.path / MARK).exists() and any(damaged_parts(pixels))
    again = _pixels(world)
    assert not again.reused and again.path == pixels.path and verify_artifact(again) == []
    assert f"rebuilt because {files[1]} has other bytes than its manifest says" in caplog.text
    assert again.manifest.summary["decoded"] == 8, "its pictures, and no others"
    assert [file.name for file in files if file.stat().st_ino != whole[file.name][1]] == [files[1].name]
    assert all(file.stat().st_mtime_ns == whole[file.name][2] for file in (files[0], files[2]))
    assert {file.name: file.read_bytes() for file in files} == {name: data for name, (data, *_) in whole.items()}
    assert sorted(path.name for path in pixels.path.iterdir() if path.name.startswith(".")) == []


def test_a_shard_of_an_older_version_is_remade_alone_in_the_version_that_has_more(
    world: DataWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest version is laid out after versions that are gone; its own layout is kept all the same."""
    monkeypatch.setattr(manifest, "_SMALL_ROWS", 0)
    _pixels(world, 10)
    grown = _pixels(world, 25)
    files, before = shard_files(grown), grown.manifest
    for other in grown.path.parent.iterdir():
        if other != grown.path:
            (other / "manifest.json").unlink()
    inodes = {file.name: file.stat().st_ino for file in files}
    flip(files[0], files[0].stat().st_size // 2)
    with pytest.raises(DamagedError):
        crops_of(grown).take(SIZE, np.arange(len(read_row_list(grown.path))))
    again = _pixels(world, 25)
    assert again.path == grown.path and verify_artifact(again) == [] and again.manifest.files == before.files
    assert [file.name for file in files if file.stat().st_ino != inodes[file.name]] == [files[0].name]


def test_a_mark_without_damage_is_forgotten(world: DataWorld, pixels: Artifact) -> None:
    (pixels.path / MARK).touch()
    assert verify_artifact(pixels) == []
    assert _pixels(world).reused and not (pixels.path / MARK).exists()


def test_a_list_of_rows_is_hashed_whatever_its_size(
    world: DataWorld, pixels: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manifest, "_SMALL_ROWS", 0)
    monkeypatch.setattr(manifest, "_SMALL", 0)
    rows = pixels.path / ROWS_FILE
    whole, inodes = rows.read_bytes(), {file.name: file.stat().st_ino for file in shard_files(pixels)}
    flip(rows, len(whole) // 2)
    again = _pixels(world)
    assert rows.read_bytes() == whole and verify_artifact(again) == []
    assert {file.name: file.stat().st_ino for file in shard_files(again)} == inodes, "no shard was made again"
    assert f"{rows} has other bytes than its manifest says" in caplog.text
