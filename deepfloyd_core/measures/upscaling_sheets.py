"""Sheets of an upscaler on held-out pictures: a row for each method, the ground truth below; and the same with zoomed
details.
"""

from pathlib import Path

import numpy as np

from deepfloyd_core.config.stages import UPSCALE
from deepfloyd_core.measures.comparison import Picture
from deepfloyd_core.measures.pixel import busiest
from deepfloyd_core.pictures.sheets import framed, save_picture, titled_rows

_SHOWN, _CELL_PX = 8, 192
_DETAIL_PX = 64  # edge of a zoomed window: 16 px of the low-res picture
_FRAME = (255, 0, 160)

Labelled = tuple[str, list[np.ndarray]]  # a row of a sheet: uint8 pictures (H, W, 3)


def save_sheets(rows: list[Labelled], title: str, whole: Path, details: Path) -> None:
    """Save both sheets of the first pictures of each row. rows: low-res or upscaled pictures, the ground truth last.

    A frame in the ground truth shows where the zoomed details lie: where it has most detail.
    """
    rows = [(label, pictures[:_SHOWN]) for label, pictures in rows]
    label, truths = rows[-1]
    corners = [busiest(truth, Picture(truth).low_pass, _edge(truth), UPSCALE) for truth in truths]
    marked = [framed(truth, corner, _edge(truth), _FRAME) for truth, corner in zip(truths, corners, strict=True)]
    save_picture(titled_rows([*rows[:-1], (f"{label}, zoomed part framed", marked)], _CELL_PX, title), whole)
    zoomed = [
        (label, [_cut(picture, corner, truth) for picture, corner, truth in zip(row, corners, truths, strict=True)])
        for label, row in rows
    ]
    save_picture(titled_rows(zoomed, _CELL_PX, f"{title}, zoomed: {_DETAIL_PX} px"), details)


def _edge(truth: np.ndarray) -> int:
    """Edge of the zoomed window, px; at most the picture's shorter edge."""
    return min(_DETAIL_PX, int(truth.shape[0]), int(truth.shape[1]))


def _cut(picture: np.ndarray, corner: tuple[int, int], truth: np.ndarray) -> np.ndarray:
    """The zoomed window of a picture that has the ground truth's size or the low-res size."""
    edge, (top, left) = _edge(truth) * len(picture) // len(truth), (at * len(picture) // len(truth) for at in corner)
    return picture[top : top + edge, left : left + edge]
