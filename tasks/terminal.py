"""The terminal: text is printed unchanged, whatever a path or an error contains; rich would read `[x]` in it as markup.

Only control characters are not: a key of a file, a name or a caption could move the cursor, hide lines or change the title
of the window with them. They are printed as \\u001b, which JSON reads too.
"""

import re
from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

STYLES = {"champion": "", "candidate": "bold yellow", "blocked": "bold red", "unknown": "bold red"}  # of versions
_WIDEST = 500  # characters of a table


# Those of ASCII but tab and line feed, those after ASCII, and those that turn the direction of a text.
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class _Plain(Console):
    """Prints text as it is, in tables too: no markup, no `:emoji:`, no colours for numbers, no line broken."""

    def __init__(self, stderr: bool = False, file: IO[str] | None = None, width: int | None = None) -> None:
        super().__init__(
            stderr=stderr, file=file, width=width, markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich; its own control sequences, as of a progress bar, are segments of another kind."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def visible(text: str) -> str:
    """A text with its control characters written out."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def console(stderr: bool = False) -> Console:
    """The console of a command."""
    return _Plain(stderr=stderr)


def is_watched(console: Console) -> bool:
    """Whether its text is seen on a terminal and kept nowhere. FORCE_COLOR, which makes rich believe so, changes nothing."""
    return console.file.isatty()


def labelled(label: str, style: str, text: str) -> Text:
    """`label: text`, the label in a style."""
    return Text.assemble((f"{label}:", style), " ", text)


def print_table(out: Console, table: Table) -> None:
    """Print a table whose cells stay in one piece, also where the terminal is narrower."""
    _Plain(file=out.file, width=_WIDEST).print(table)
