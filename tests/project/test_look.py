"""What is seen of a folder: which files are opened, which names are texts."""

import os
from collections.abc import Iterator
from pathlib import Path

import picture_folders
import pytest
from traced import traced_peak

from deepfloyd_core.project import look as module
from deepfloyd_core.project.captions import is_worded
from deepfloyd_core.project.choose_data import subject
from deepfloyd_core.project.look import look_at
from deepfloyd_core.sources.folder import Folder
from deepfloyd_core.sources.listing import Listed


@pytest.mark.parametrize(
    ("stem", "worded"),
    [
        ("a red car", True), ("a_red_car_01", True), ("portrait of an old man", True), ("IMG_1234", False),
        ("WhatsApp Image 2024-01-01 at 10.00.00", False), ("Screenshot from 2024", False), ("PXL_20240101_101010", False),
        ("cat", False), ("a-red-car", False), ("Photo de la mer", True), ("DSC00001 copy of 2", False),
    ],
)  # fmt: skip
def test_names_that_are_texts(stem: str, worded: bool) -> None:
    assert is_worded(stem) == worded


@pytest.mark.parametrize(
    ("folder", "noun"),
    [("my cat", "cat"), ("MyOldCat", "cat"), ("DCIM", ""), ("100APPLE", ""), ("rex_2024-05", "rex"), ("photos", ""),
     ("red vintage car photos", "red vintage car"), ("猫", "猫")],
)  # fmt: skip
def test_the_subject_of_a_prompt_is_in_the_folders_name(folder: str, noun: str) -> None:
    assert subject(Path("/x") / folder, has_faces=False) == noun
    assert subject(Path("/x") / folder, has_faces=True) == "person"


def test_a_sample_is_the_same_each_time_and_counts_what_it_stands_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_OPENED", 40)
    picture_folders.smooth(0, 80, 80).save(tmp_path / "0.png")
    for number in range(1, 200):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    for number in range(100):
        (tmp_path / f"bad{number}.jpg").write_bytes(b"x")
    found, again = look_at(tmp_path), look_at(tmp_path)
    assert found == again and (found.files, found.opened) == (300, 40) and found.is_sample
    assert found.pictures == round(300 * len(found.seen) / 40) and 150 < found.pictures < 250
    assert dict(found.unusable) == {"unsupported": 40 - len(found.seen)}


def test_few_large_files_are_all_that_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    for number in range(30):
        picture_folders.smooth(number, 80, 80).save(tmp_path / f"{number}.bmp")
    found = look_at(tmp_path)
    assert (found.files, found.opened, found.pictures) == (30, 24, 30)


def test_memory_does_not_grow_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what a listing of one directory takes: of the names themselves only a sample is kept."""
    picture_folders.smooth(0, 80, 80).save(tmp_path / "0.png")
    real = Folder.listing

    def peak(count: int) -> int:
        def many(source: Folder) -> Iterator[Listed]:
            (only,) = real(source)
            yield only
            yield from (only._replace(source=f"gone/{number:060}.png", reason="unreadable") for number in range(count))
            yield from (only._replace(source=f"{number:060}.mov", kind="other") for number in range(count))

        monkeypatch.setattr(Folder, "listing", many)
        with traced_peak() as peak:
            found = look_at(tmp_path)
        assert (found.files, found.pictures, len(found.examples)) == (count + 1, 1, 3)
        return peak[0]

    peak(2_000)  # what it imports stays
    assert peak(50_000) < 2e7, "all names and their rows take 2.3e7"


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    picture_folders.one(tmp_path / "one")
    (tmp_path / "one" / "again").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "self.png").symlink_to("self.png")
    found = look_at(tmp_path / "one")
    assert found.pictures == 1 and found.files == 3
