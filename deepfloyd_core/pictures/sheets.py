"""Pictures for people: contact sheets with Pillow, the loss curve with matplotlib."""

import io
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deepfloyd_core.files import atomic_path, write_bytes

_GAP, _TITLE_PX, _LINE_PX = 6, 22, 15
_INK, _SOFT, _PAPER = (30, 30, 30), (105, 105, 105), (250, 250, 250)
_BACK, _GREY = (232, 232, 232), (198, 198, 198)  # behind a picture; instead of one


@dataclass(frozen=True)
class Cell:
    """A picture with lines of text below it."""

    picture: np.ndarray | None  # uint8 (H, W, 3); None: a grey cell
    instead: str  # what the grey cell says
    lines: tuple[str, ...]  # cut to the cell's width; the first is darker


def contact_sheet(pictures: list[np.ndarray], columns: int, cell_px: int) -> Image.Image:
    """A grid of uint8 (H, W, 3) pictures, each fitted into a square cell; small ones are upscaled without smoothing."""
    columns = max(1, min(columns, len(pictures)))
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell_px + _GAP) + _GAP, lines * (cell_px + _GAP) + _GAP), _PAPER)
    for number, picture in enumerate(pictures):
        line, column = divmod(number, columns)
        _paste(sheet, picture, (_GAP + column * (cell_px + _GAP), _GAP + line * (cell_px + _GAP)), cell_px)
    return sheet


def titled_rows(rows: list[tuple[str, list[np.ndarray]]], cell_px: int, title: str, least_px: int = 0) -> Image.Image:
    """One line of pictures for each (label, pictures), with a title above and each label over its line. least_px: the width
    of a sheet with few pictures in a line.
    """
    columns = max(len(pictures) for _, pictures in rows)
    line_px = cell_px + _TITLE_PX + _GAP
    width = max(least_px, columns * (cell_px + _GAP) + _GAP)
    sheet = Image.new("RGB", (width, _TITLE_PX + len(rows) * line_px + _GAP), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    pen.text((_GAP, 4), fitted(title, sheet.width - 2 * _GAP, 15), _INK, ImageFont.load_default(15))
    for line, (label, pictures) in enumerate(rows):
        top = _TITLE_PX + line * line_px
        pen.text((_GAP, top + 4), fitted(label, sheet.width - 2 * _GAP, 14), _INK, font)
        for column, picture in enumerate(pictures):
            _paste(sheet, picture, (_GAP + column * (cell_px + _GAP), top + _TITLE_PX), cell_px)
    return sheet


def framed(picture: np.ndarray, corner: tuple[int, int], edge_px: int, colour: tuple[int, int, int]) -> np.ndarray:
    """A copy of a picture with a frame around a square window; corner: its top and left."""
    image = Image.fromarray(picture)
    top, left = corner
    ImageDraw.Draw(image).rectangle((left, top, left + edge_px - 1, top + edge_px - 1), outline=colour, width=2)
    return np.asarray(image)


def captioned_sheet(cells: list[Cell], columns: int, cell_px: int, title: str) -> Image.Image:
    """A grid of pictures with the text of each below it, and a title above."""
    columns, count = max(1, min(columns, len(cells))), max(len(cell.lines) for cell in cells)
    across, down = cell_px + 2 * _GAP, cell_px + count * _LINE_PX + 3 * _GAP
    sheet = Image.new("RGB", (columns * across + _GAP, _TITLE_PX + _GAP - (-len(cells) // columns) * down), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 5), fitted(title, sheet.width - 2 * _GAP, 15), _INK, font(15))
    for number, cell in enumerate(cells):
        line, column = divmod(number, columns)
        left, top = _GAP + column * across, _TITLE_PX + _GAP + line * down
        corners = (left, top, left + cell_px - 1, top + cell_px - 1)
        pen.rectangle(corners, _GREY if cell.picture is None else _BACK)
        if cell.picture is None:
            pen.text((left + _GAP, top + _GAP), "\n".join(wrapped(cell.instead, cell_px - 2 * _GAP, 8)), _INK, font(12))
        else:
            _paste(sheet, cell.picture, (left, top), cell_px)
        for place, text in enumerate(cell.lines):
            spot = left, top + cell_px + 3 + place * _LINE_PX
            pen.text(spot, fitted(text, cell_px, 12), _SOFT if place else _INK, font(12))
    return sheet


@lru_cache
def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font: it needs no file, and has ASCII only."""
    return ImageFont.load_default(size_px)


def fitted(text: str, room_px: int, size_px: int, keep_end: bool = False) -> str:
    """A text in one line, cut to a width. Characters that the font lacks are escaped as in Python, so no mark or
    newline in a file's name can break the picture.
    """
    text = "".join(sign if " " <= sign <= "~" else sign.encode("unicode_escape").decode() for sign in text)
    if font(size_px).getlength(text) <= room_px:
        return text

    def cut(count: int) -> str:
        return f"...{text[len(text) - count :]}" if keep_end else f"{text[:count]}..."

    keep = bisect_left(range(1, len(text)), True, key=lambda count: font(size_px).getlength(cut(count)) > room_px)
    return cut(keep)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG or JPEG durably, by the path's suffix."""
    file = io.BytesIO()  # on a full disk Pillow takes half a JPEG for a whole one
    picture.save(file, format="JPEG" if path.suffix == ".jpg" else "PNG", quality=88)
    write_bytes(path, file.getvalue())


def save_loss_curve(losses: list[float], title: str, path: Path, held_out: list[tuple[int, float]]) -> None:
    """Plot the loss of each step and its running mean, and the held-out loss of some steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = np.arange(1, len(losses) + 1)
    window = max(1, len(losses) // 20)
    kernel = np.ones(window) / window
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    if window == 1:  # so few that each is a point to see
        axes.plot(steps, losses, "o-", color="#1f4e99", linewidth=1, markersize=4, label="each step")
    else:
        axes.plot(steps, losses, color="#b8c4d6", linewidth=1, label="each step")
        axes.plot(steps[window - 1 :], np.convolve(losses, kernel, "valid"), color="#1f4e99", label=f"mean of {window}")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), "o--", color="#c0392b", linewidth=1, markersize=4, label="held out, fixed t"
        )
    edge, top = 0.03 * len(losses), max([*losses, *(loss for _, loss in held_out)])
    axes.set(title=title, xlabel="step", ylabel="loss", xlim=(-edge, len(losses) + edge), ylim=(0, 1.1 * top or 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_path(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100)


def save_token_counts(counts: list[int], length: int, path: Path) -> None:
    """Plot how many texts have how many tokens; those beyond `length` lose their end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0.5, max([*counts, length]) + 0.5, min(max([*counts, length]), 77) + 1)
    axes.hist(counts, edges.tolist(), color="#1f4e99")
    axes.axvline(length + 0.5, color="#c0392b", linewidth=1, label=f"{length} tokens are kept")
    axes.set(title="Tokens of a text", xlabel="tokens, the end token among them", ylabel="texts")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_path(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100)


def wrapped(text: str, room_px: int, most: int) -> list[str]:
    """A text broken at its spaces to lines that fit into a width; dots end the last one where there were more."""
    broken: list[str] = []
    for word in text.split():
        if broken and font(12).getlength(f"{broken[-1]} {word}") <= room_px:
            broken[-1] += f" {word}"
        elif len(broken) == most:
            return [*broken[:-1], fitted(f"{broken[-1]} {word}", room_px, 12)]
        else:
            broken.append(fitted(word, room_px, 12))
    return broken


def _paste(sheet: Image.Image, picture: np.ndarray, place: tuple[int, int], cell_px: int) -> None:
    image = Image.fromarray(picture)
    scale = cell_px / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    sheet.paste(image, (place[0] + (cell_px - size[0]) // 2, place[1] + (cell_px - size[1]) // 2))
