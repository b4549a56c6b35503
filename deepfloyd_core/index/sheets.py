"""Sheets of the index for people: a few rejected files of each reason, a few groups of duplicates."""

from itertools import islice
from pathlib import Path

import numpy as np

from deepfloyd_core.config.data_sets import ImageDataset
from deepfloyd_core.config.run import Run
from deepfloyd_core.index.ledger import (
    AS_ASKED,
    INDEX_FILE,
)
from deepfloyd_core.index.pairs import PAIR_REASONS
from deepfloyd_core.index.rejected import COLUMNS, Rejected, choose, draw
from deepfloyd_core.index.twins import Member
from deepfloyd_core.pictures.decode import decode_what_is_there
from deepfloyd_core.pictures.faults import Unreadable
from deepfloyd_core.pictures.sheets import fitted, save_picture, titled_rows
from deepfloyd_core.processes.pool import Children
from deepfloyd_core.sources.source import read_again

SHEET, SHEET_CELL_PX = "rejected.png", 144
TWINS_SHEET, GROUPS_SHOWN = "twins.png", 8
# Reasons of rejected pictures that are safe to decode for the sheet; pictures with other reasons do harm, or change.
_SHOWN = (
    "too_small", "aspect_out_of_range", "not_for_this_stage", "corrupt", "truncated", "caption_missing", *PAIR_REASONS,
)  # fmt: skip


def save_rejected(run: Run, count: int, out: Path, children: Children) -> None:
    """Draw a few of the `count` rejected files; no file when there are none. Decodes at most those that it shows."""
    (out / SHEET).unlink(missing_ok=True)  # an interrupted build may have found others
    if not count:
        return
    rows = choose(out / INDEX_FILE, not_wanted=AS_ASKED)
    datasets = {dataset.id: dataset for dataset in run.datasets}
    shown = [row for row in rows if row.reason in _SHOWN]
    pictures = dict(
        zip(shown, children.map(thumbnail, [(datasets[row.dataset_id], row) for row in shown]), strict=True)
    )
    decoded = {row: picture for row, picture in pictures.items() if isinstance(picture, np.ndarray)}
    save_picture(draw(rows, decoded, count, SHEET_CELL_PX), out / SHEET)


def save_twins(run: Run, groups: list[list[Member]], out: Path, children: Children) -> None:
    """Draw some pictures of some groups, one line for each; no file when there are none."""
    (out / TWINS_SHEET).unlink(missing_ok=True)
    if not groups:
        return
    datasets = {dataset.id: dataset for dataset in run.datasets}
    shown = [members[:COLUMNS] for members in groups[:GROUPS_SHOWN]]
    made = children.map(thumbnail, [(datasets[one.dataset_id], one) for members in shown for one in members])
    nothing = np.full((SHEET_CELL_PX, SHEET_CELL_PX, 3), 198, np.uint8)
    lines = []
    for members in shown:
        pictures = [picture if isinstance(picture, np.ndarray) else nothing for picture in islice(made, len(members))]
        names = ", ".join(one.source for one in members)
        lines.append((fitted(names, len(pictures) * SHEET_CELL_PX, 14), pictures))
    title = f"{len(shown)} of {len(groups):,} groups of duplicates"
    save_picture(titled_rows(lines, SHEET_CELL_PX, title), out / TWINS_SHEET)


def thumbnail(job: tuple[ImageDataset, Rejected | Member]) -> np.ndarray | None:
    """A picture of a data set as a cell of a sheet, uint8 (H, W, 3); None where it cannot be drawn. In a child process."""
    dataset, row = job
    try:
        data = read_again(dataset, row.source, row.image_id)
        return None if data is None else np.asarray(decode_what_is_there(data, SHEET_CELL_PX))
    except (OSError, Unreadable):
        return None
