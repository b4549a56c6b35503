"""Sheets of drawn pictures: those of one version, and those of several with the same seeds below each other. No torch."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from deepfloyd_core.pictures.sheets import save_picture, titled_rows
from deepfloyd_core.sampling.pictures import SHEET, Picture, picture_file
from deepfloyd_core.store.counts import many

ROWS, COLUMNS, CELL_PX = 24, 8, 128


def save_sheet(pictures: Sequence[Picture], folder: Path, scale: int, drawn_by: str) -> None:
    """A row for each prompt and size, with its seeds, as far as there is room. scale: pixels of the stage that is shown
    along one of the first. drawn_by: in words.
    """
    rows = [(_words(group), _shown(pictures, group, folder, scale)) for group in _groups(pictures)[:ROWS]]
    title = f"{many(len(pictures), 'picture')} of {drawn_by}"
    save_picture(titled_rows(rows, CELL_PX, title), folder / SHEET)


def version_words(version: str) -> str:
    """`version 3`, `the base`."""
    return f"version {version}" if version.isdecimal() else f"the {version}"


def save_comparison(pictures: Sequence[Picture], folders: Mapping[str, Path], scale: int, file: Path) -> None:
    """For each prompt and size a row of each folder, by its name. scale: as above."""
    rows = [
        (f"{name}: {_words(group)}", _shown(pictures, group, folder, scale))
        for group in _groups(pictures)[: max(1, ROWS // len(folders))]
        for name, folder in folders.items()
    ]
    save_picture(titled_rows(rows, CELL_PX, " and ".join(folders)), file)


Group = list[tuple[int, Picture]]  # with their numbers


def _groups(pictures: Sequence[Picture]) -> list[Group]:
    return [list(group) for _, group in groupby(enumerate(pictures), key=lambda each: (each[1].prompt, each[1].size))]


def _words(group: Group) -> str:
    return " ".join(group[0][1].prompt.split())


def _shown(pictures: Sequence[Picture], group: Group, folder: Path, scale: int) -> list[np.ndarray]:
    shown = []
    for number, _ in group[:COLUMNS]:
        with Image.open(folder / picture_file(pictures, number, scale)) as picture:
            cell = picture.convert("RGB")
            if max(cell.size) > 2 * CELL_PX:  # else a sheet of 1,024 px holds gigabytes
                cell.thumbnail((2 * CELL_PX, 2 * CELL_PX), Image.Resampling.LANCZOS)
            shown.append(np.asarray(cell))
    return shown
