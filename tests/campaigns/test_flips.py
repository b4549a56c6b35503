"""The campaign of flipped bits in short, and that it sees a flip that is used."""

from pathlib import Path
from random import Random

import pytest
from flips import Scene, attack, flips, release_scene

from deepfloyd_core.errors import DeepFloydError


@pytest.mark.slow  # some trainings are made again
def test_no_flipped_bit_of_a_published_file_is_used(tmp_path: Path) -> None:
    rows = attack(1, 1, tmp_path)
    assert len({row.kind for row in rows}) == len(rows) > 40
    for row in rows:
        assert row.tried and not row.failed, row.failures


def test_no_flipped_bit_of_a_release_is_published_or_decides_what_serves(tmp_path: Path) -> None:
    found = list(flips(release_scene(tmp_path), Random(1), 2))
    assert len({kind for kind, _ in found}) > 10 and [fault for _, fault in found if fault] == []


def _tried(folder: Path, error: str = "") -> str:
    """What is found where a file is used unchecked, or where a command ends with an error."""
    folder.mkdir()
    file = folder / "file"
    file.write_bytes(b"whole")

    def act() -> dict[str, bytes]:
        if error and file.read_bytes() != b"whole":
            raise DeepFloydError(error)
        return {"what is used": file.read_bytes()}

    (_, fault), *_ = flips(Scene(folder, act, lambda file: file.name), Random(1), 0)
    return fault


def test_the_campaign_sees_a_flip_that_is_used_and_an_error_that_names_nothing(tmp_path: Path) -> None:
    used = _tried(tmp_path / "a")
    assert used.startswith("file, bit ") and used.endswith("another what is used")
    assert _tried(tmp_path / "b", "something is wrong").endswith("an error that does not name it: something is wrong")
    assert _tried(tmp_path / "c", "file is damaged") == ""
