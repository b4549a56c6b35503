"""The words on sheets of drawn pictures: what tells one row from another, and what there was no room for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepfloyd_core.pictures import sheets
from deepfloyd_core.sampling import comparison
from deepfloyd_core.sampling.comparison import save_comparison, save_sheet
from deepfloyd_core.sampling.pictures import Picture, PromptRow, grid, picture_file

Rows = list[tuple[str, int]]  # the label of each row, and how many pictures it has


def sheet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pictures: tuple[Picture, ...], compared: tuple[str, ...] = ()
) -> tuple[str, Rows]:
    """The title of a sheet and its rows."""
    folder.mkdir()
    for number in range(len(pictures)):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / picture_file(pictures, number, 1))
    found: list[Any] = []
    made = sheets.titled_rows

    def seen(rows: list[tuple[str, list[np.ndarray]]], *more: Any) -> Image.Image:
        found.append((more[1], [(label, len(shown)) for label, shown in rows]))
        return made(rows, *more)

    monkeypatch.setattr(comparison, "titled_rows", seen)
    if compared:
        save_comparison(pictures, dict.fromkeys(compared, folder), 1, folder / "sheet.png")
    else:
        save_sheet(pictures, folder, 1, "the base")
    with Image.open(folder / "sheet.png") as image:
        assert image.width >= comparison.LEAST_PX
    ((title, rows),) = found
    return title, rows


def test_rows_say_what_tells_them_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = grid([PromptRow(prompt="a"), PromptRow(prompt="b\n c")], (3,), ((64, 64),), "")
    assert sheet(tmp_path / "1", monkeypatch, alike) == ("2 pictures of the base", [("a", 1), ("b c", 1)])
    sizes = grid([PromptRow(prompt="a")], (0, 1, 7), ((64, 64), (96, 64)), "")
    assert sheet(tmp_path / "2", monkeypatch, sizes)[1] == [
        ("64x64; seeds 0, 1, 7: a", 3), ("96x64; seeds 0, 1, 7: a", 3),
    ]  # fmt: skip
    negatives = grid([PromptRow(prompt="a"), PromptRow(prompt="a", negative_prompt="dull")], (3,), ((64, 64),), "")
    assert sheet(tmp_path / "3", monkeypatch, negatives)[1] == [("no negative prompt: a", 1), ("not dull: a", 1)]
    of_rows = grid([PromptRow(prompt="a", seeds=(1,)), PromptRow(prompt="b", seeds=(2,))], (), ((64, 64),), "")
    assert sheet(tmp_path / "4", monkeypatch, of_rows)[1] == [("seed 1: a", 1), ("seed 2: b", 1)]


def test_what_was_cut_is_in_the_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PromptRow(prompt=str(number)) for number in range(25)]
    title, shown = sheet(tmp_path / "1", monkeypatch, grid(rows, tuple(range(9)), ((64, 64),), ""))
    assert title == "24 of 25 rows, 8 of 9 seeds shown: 225 pictures of the base"
    assert len(shown) == 24 and {count for _, count in shown} == {8}
    title, shown = sheet(tmp_path / "2", monkeypatch, grid(rows, (0,), ((64, 64),), ""), ("the base", "version 1"))
    assert title == "12 of 25 rows shown: the base and version 1" and len(shown) == 24
    assert shown[:2] == [("the base: 0", 1), ("version 1: 0", 1)]
    whole = grid(rows[:24], tuple(range(8)), ((64, 64),), "")
    assert sheet(tmp_path / "3", monkeypatch, whole)[0] == "192 pictures of the base"
