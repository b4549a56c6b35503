"""Markdown as Prefect's UI shows it. Names of files, captions and reasons are the user's: their marks are escaped."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from deepfloyd_core.pictures.data_uri import data_uri, picture_uri

MOST_CHARACTERS = 1000  # of a line
PAGE_BYTES = 210 << 10  # of a page's pictures: base64 makes them a third longer, and a page should stay below 300 KiB
Titled = tuple[str, Path | Image.Image]  # a picture and its title
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|<>&~-])")


def plain(text: str, most: int = MOST_CHARACTERS) -> str:
    """Text that markdown shows as it is, in one line, with an ellipsis where it is cut."""
    line = " ".join(text.split())
    return _MARKUP.sub(r"\\\1", line if len(line) <= most else f"{line[: most - 1]}…")


def code(text: object) -> str:
    """Text as code in one line, also with backticks in it; a bar would end the cell of a table."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def items(lines: Iterable[str]) -> list[str]:
    """A list."""
    return [*(f"- {plain(line)}" for line in lines), ""]


def titled_items(title: str, lines: Sequence[str]) -> list[str]:
    """A list with a title, of lines that are markdown; nothing without lines. It is broken on a phone, a table cut off."""
    return [f"**{plain(title)}**", "", *(f"- {line}" for line in lines), ""] if lines else []


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table. The UI breaks no cell, and cuts off what is beyond some 100 characters.

    Cells are markdown.
    """
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines, ""]


def titled_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table with a title; nothing without rows."""
    lines = list(rows)
    return [f"**{plain(title)}**", "", *table(heads, lines)] if lines else []


def pictures(titled: Sequence[Titled]) -> list[str]:
    """Pictures with their titles. A file that is lost is left out."""
    lines: list[str] = []
    for title, picture in titled:
        limit = PAGE_BYTES // len(titled)
        try:
            uri = data_uri(picture, limit) if isinstance(picture, Path) else picture_uri(picture, limit)
        except OSError:
            continue
        lines += [f"**{plain(title)}**", "", f"![{plain(title)}]({uri})", ""]
    return lines
