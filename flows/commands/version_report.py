"""Prints versions on the terminal: their history, and how two of them differ."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from deepfloyd_core.bundle.difference import difference, save_side_by_side
from deepfloyd_core.bundle.history import history
from deepfloyd_core.bundle.publish import Publication
from deepfloyd_core.store.counts import many
from deepfloyd_core.store.versions import find_version, readable_versions
from tasks.terminal import STYLES, labelled, print_table

WIDE = 140  # characters; a table in a narrower terminal would break every cell


def print_history(out: Console, workspace: Path) -> None:
    """Print a table of the versions, and a line for each damaged or missing record."""
    rows = history(workspace)
    table = Table("version", "state", "published (UTC)", "run file", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("held-out loss, base -> tuned\n(less is better)")
    table.add_column("Stage II's PSNR over the base's\n(more is better)")
    table.add_column("reason")
    if is_warm := any(row.start for row in rows):
        table.add_column("trained")
    for row in rows:
        when, state = row.when[:16].replace("T", " "), Text(row.state, STYLES.get(row.state, ""))
        figures = "\n".join(row.losses), "\n".join(row.gains)
        trained = [row.start] if is_warm else []
        table.add_row(str(row.version), state, when, row.run_file, *figures, row.reason, *trained)
    if not rows:
        out.print(f"no version of {workspace} is published yet")
    elif out.is_terminal and out.width < WIDE:
        for row in rows:
            out.print(
                Text.assemble("version ", (str(row.version), "bold"), "  ", (row.state, STYLES.get(row.state, "")))
            )
            for fact in filter(None, (f"{row.when[:16].replace('T', ' ')} UTC", row.run_file, *row.facts)):
                out.print(Padding(Text(fact), (0, 0, 0, 2)))
    else:
        _print_whole(out, table)
    for fault in readable_versions(workspace)[1]:
        out.print(labelled("fault", "bold red", fault))


def print_difference(out: Console, workspace: Path, first: int, second: int) -> None:
    """Print how the second version differs from the first, and save their samples side by side."""
    versions = find_version(workspace, str(first)), find_version(workspace, str(second))
    found = difference(workspace, *versions)
    for title, lines in (("pictures", found.pictures), ("settings", found.settings)):
        out.print(Text(title, "bold"))
        for line in lines or ("no difference",):
            out.print(f"  {line}")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for head in ("figures", f"version {first}", f"version {second}", f"change from {first} to {second}"):
        table.add_column(head, justify="right" if head.startswith("version") else "left")
    for row in found.figures:
        table.add_row(row.name, *(_figure(value) for value in (row.first, row.second)), row.change)
    _print_whole(out, table)
    path = workspace / f"diff_{first}_{second}.png"
    shown = save_side_by_side(workspace, *versions, path)
    if shown:
        out.print(f"{many(shown, 'sample')} of the same seeds, side by side: {path}")
    else:
        out.print("no sample has the same prompt, seed and size in both")


def _print_whole(out: Console, table: Table) -> None:
    """Print a table. A terminal breaks its cells, a file or a pipe does not."""
    if out.is_terminal:
        out.print(table)
    else:
        print_table(out, table)


def _figure(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def print_publication(out: Console, plan: Publication) -> None:
    """Print what publishing comes to: each file, its size, and whether it is sent."""
    table = Table("file", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("bytes", justify="right")
    table.add_column("")
    for file in plan.files:
        table.add_row(file.name, f"{file.bytes:,}", "there already" if file.name in plan.known.same else "is sent")
    for name in plan.removed:
        table.add_row(name, "", "of an earlier publication, is removed")
    _print_whole(out, table)
    size = sum(file.bytes for file in plan.sent)
    out.print(
        f"{plan.title} to {plan.place.name}: {many(len(plan.sent), 'file')}, {size / 2**20:,.1f} MiB", soft_wrap=True
    )
