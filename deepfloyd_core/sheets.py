"""Pictures for people: contact sheets with Pillow, the loss curve with matplotlib."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deepfloyd_core.files import atomic_path

_GAP, _TITLE_PX = 6, 22
_INK, _PAPER = (30, 30, 30), (250, 250, 250)


def contact_sheet(pictures: list[np.ndarray], columns: int, cell_px: int) -> Image.Image:
    """A grid of uint8 (H, W, 3) pictures, each fitted into a square cell; small ones are enlarged without smoothing."""
    columns = max(1, min(columns, len(pictures)))
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell_px + _GAP) + _GAP, lines * (cell_px + _GAP) + _GAP), _PAPER)
    for number, picture in enumerate(pictures):
        line, column = divmod(number, columns)
        _paste(sheet, picture, (_GAP + column * (cell_px + _GAP), _GAP + line * (cell_px + _GAP)), cell_px)
    return sheet


def titled_rows(rows: list[tuple[str, list[np.ndarray]]], cell_px: int, title: str) -> Image.Image:
    """One line of pictures for each (label, pictures), with a title above and each label over its line."""
    columns = max(len(pictures) for _, pictures in rows)
    line_px = cell_px + _TITLE_PX + _GAP
    sheet = Image.new("RGB", (columns * (cell_px + _GAP) + _GAP, _TITLE_PX + len(rows) * line_px + _GAP), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    pen.text((_GAP, 4), title, _INK, ImageFont.load_default(15))
    for line, (label, pictures) in enumerate(rows):
        top = _TITLE_PX + line * line_px
        pen.text((_GAP, top + 4), label, _INK, font)
        for column, picture in enumerate(pictures):
            _paste(sheet, picture, (_GAP + column * (cell_px + _GAP), top + _TITLE_PX), cell_px)
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG durably, by the path's suffix."""
    with atomic_path(path) as tmp:
        picture.save(tmp, format="JPEG" if path.suffix == ".jpg" else "PNG", quality=88)


def save_loss_curve(losses: list[float], title: str, path: Path) -> None:
    """Plot the loss of each step and its running mean."""
    from matplotlib.figure import Figure

    steps = np.arange(1, len(losses) + 1)
    window = max(1, len(losses) // 20)
    kernel = np.ones(window) / window
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#b8c4d6", linewidth=1, label="each step")
    axes.plot(steps[window - 1 :], np.convolve(losses, kernel, "valid"), color="#1f4e99", label=f"mean of {window}")
    axes.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_path(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100)


def _paste(sheet: Image.Image, picture: np.ndarray, place: tuple[int, int], cell_px: int) -> None:
    image = Image.fromarray(picture)
    scale = cell_px / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    sheet.paste(image, (place[0] + (cell_px - size[0]) // 2, place[1] + (cell_px - size[1]) // 2))
