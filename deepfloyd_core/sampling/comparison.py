"""Sheets of drawn pictures: those of one version, and those of several with the same seeds below each other. No torch."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from deepfloyd_core.pictures.sheets import save_picture, titled_rows
from deepfloyd_core.sampling.pictures import SHEET, Picture, Size, picture_file
from deepfloyd_core.store.counts import many

ROWS, COLUMNS, CELL_PX = 24, 8, 128
LEAST_PX = 3 * CELL_PX  # the width of a sheet: room for words beside a single picture


def save_sheet(pictures: Sequence[Picture], folder: Path, scale: int, drawn_by: str) -> None:
    """A row for each prompt, negative prompt and size, with its seeds, as far as there is room. scale: pixels of the stage
    that is shown along one of the first. drawn_by: in words.
    """
    groups = _groups(pictures)
    rows = [(_words(pictures, group), _shown(pictures, group, folder, scale)) for group in groups[:ROWS]]
    title = f"{_cut(groups, ROWS)}{many(len(pictures), 'picture')} of {drawn_by}"
    save_picture(titled_rows(rows, CELL_PX, title, LEAST_PX), folder / SHEET)


def version_words(version: str) -> str:
    """`version 3`, `the base`."""
    return f"version {version}" if version.isdecimal() else f"the {version}"


def save_comparison(pictures: Sequence[Picture], folders: Mapping[str, Path], scale: int, file: Path) -> None:
    """For each such row one of each folder, by its name. scale: as above."""
    groups, most = _groups(pictures), max(1, ROWS // len(folders))
    rows = [
        (f"{name}: {_words(pictures, group)}", _shown(pictures, group, folder, scale))
        for group in groups[:most]
        for name, folder in folders.items()
    ]
    save_picture(titled_rows(rows, CELL_PX, f"{_cut(groups, most)}{' and '.join(folders)}", LEAST_PX), file)


Group = list[tuple[int, Picture]]  # with their numbers


def _groups(pictures: Sequence[Picture]) -> list[Group]:
    def row(each: tuple[int, Picture]) -> tuple[str, str, Size]:
        return each[1].prompt, each[1].negative_prompt, each[1].size

    return [list(group) for _, group in groupby(enumerate(pictures), key=row)]


def _cut(groups: Sequence[Group], most: int) -> str:
    """What of rows and seeds there is no room for, as the beginning of a title; empty: all are shown."""
    longest = max(map(len, groups))
    told = [f"{most} of {len(groups)} rows"] if len(groups) > most else []
    told += [f"{COLUMNS} of {longest} seeds"] if longest > COLUMNS else []
    return f"{', '.join(told)} shown: " if told else ""


def _words(pictures: Sequence[Picture], group: Group) -> str:
    """A row in words: what tells it from others first, then its prompt."""
    first, told = group[0][1], list[str]()
    if len({one.size for one in pictures}) > 1:
        told.append("x".join(map(str, first.size)))
    if len({one.seed for one in pictures}) > 1:
        shown = [one.seed for _, one in group[:COLUMNS]]
        told.append(f"seed{'s' if len(shown) > 1 else ''} {', '.join(map(str, shown))}")
    if len({one.negative_prompt for one in pictures}) > 1:
        told.append(f"not {_line(first.negative_prompt)}" if first.negative_prompt else "no negative prompt")
    return ": ".join(filter(None, ["; ".join(told), _line(first.prompt)]))


def _line(text: str) -> str:
    return " ".join(text.split())


def _shown(pictures: Sequence[Picture], group: Group, folder: Path, scale: int) -> list[np.ndarray]:
    shown = []
    for number, _ in group[:COLUMNS]:
        with Image.open(folder / picture_file(pictures, number, scale)) as picture:
            cell = picture.convert("RGB")
            if max(cell.size) > 2 * CELL_PX:  # else a sheet of 1,024 px holds gigabytes
                cell.thumbnail((2 * CELL_PX, 2 * CELL_PX), Image.Resampling.LANCZOS)
            shown.append(np.asarray(cell))
    return shown
