"""The terminal: text is printed unchanged, whatever a path or an error contains; rich would read `[x]` in it as markup."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

STYLES = {"champion": "", "candidate": "bold yellow", "blocked": "bold red", "unknown": "bold red"}  # of versions
_WIDEST = 500  # characters of a table


def console(stderr: bool = False) -> Console:
    """Prints text as it is, in tables too: no markup, no `:emoji:`, no colours for numbers, no line broken."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def is_watched(console: Console) -> bool:
    """Whether its text is seen on a terminal and kept nowhere. FORCE_COLOR, which makes rich believe so, changes nothing."""
    return console.file.isatty()


def labelled(label: str, style: str, text: str) -> Text:
    """`label: text`, the label in a style."""
    return Text.assemble((f"{label}:", style), " ", text)


def print_table(out: Console, table: Table) -> None:
    """Print a table whose cells stay in one piece, also where the terminal is narrower."""
    wide = Console(file=out.file, width=_WIDEST, markup=False, emoji=False, highlight=False, soft_wrap=True)
    wide.print(table)
