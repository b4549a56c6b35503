"""What the GPU day leaves behind: a JSON line and a line of a table for each figure, on the disk before the next one."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_plan import Case, Figure

HEADS = ("group", "case", "figure", "goal", "measured", "met", "note", "s")


@dataclass(frozen=True)
class Row:
    """One figure of one case, or why there is none."""

    group: str
    case: str
    figure: str
    goal: str
    source: str  # of the goal
    value: float | None
    met: bool | None  # None: no goal, or none that counts here
    note: str
    failed: bool
    seconds: float  # since the case began

    def cells(self) -> list[str]:
        """Those of its line in a table."""
        shown = "failed" if self.failed else "" if self.value is None else f"{self.value:.4g}"
        verdict = "" if self.met is None else "yes" if self.met else "**no**"
        goal = f"{self.goal} ({self.source})" if self.goal else ""
        return [self.group, self.case, self.figure, goal, shown, verdict, self.note, f"{self.seconds:.1f}"]


def measured(case: Case, what: str, value: float, note: str, seconds: float, judged: bool) -> Row:
    """The row of a figure. judged: its goal counts also where it is of speed or memory."""
    one = next((figure for figure in case.figures if figure.what == what), Figure(what))
    counts = one.goal is not None and (judged or one.goal.everywhere)
    met = one.goal.met(value) if one.goal is not None and counts else None
    # JSON has no NaN: a figure that could not be had is none.
    kept = value if math.isfinite(value) else None
    return Row(case.group, case.name, _name(one), str(one.goal or ""), _source(one), kept, met, note, False, seconds)


def failure(case: Case, message: str, seconds: float) -> Row:
    """The row of a case that ended without its figures."""
    goals = ", ".join(f"{one.what} {one.goal}" for one in case.figures if one.goal)
    return Row(case.group, case.name, "", goals, "", None, None, message, True, seconds)


def _name(one: Figure) -> str:
    return one.what + (f", {one.unit}" if one.unit else "")


def _source(one: Figure) -> str:
    return one.goal.source if one.goal else ""


class Results:
    """Two files that only grow: FILE.jsonl, and FILE.md for the eye."""

    def __init__(self, stem: Path, run: dict[str, Any]) -> None:
        """run: what every row of this run has: when, machine, versions."""
        self._json, self._table = beside(stem, "jsonl"), beside(stem, "md")
        self._run, self.rows = run, list[Row]()
        stem.parent.mkdir(parents=True, exist_ok=True)
        said = ", ".join(f"{name} {value}" for name, value in run.items())
        # An earlier run may have been cut in the middle of a line.
        _append(self._json, "" if _ends_a_line(self._json) else "\n")
        lines = ("", f"## {said}", "", *table_head(HEADS))
        _append(self._table, "".join(f"{line}\n" for line in lines))

    def add(self, row: Row) -> None:
        """Keep a row, on the disk when this returns."""
        self.rows.append(row)
        _append(self._json, json.dumps({**self._run, **asdict(row)}) + "\n")
        _append(self._table, table_line(row.cells()) + "\n")

    def say(self, line: str) -> None:
        """Add a line below the table."""
        _append(self._table, f"\n{line}\n")

    def table(self) -> str:
        """This run's rows."""
        return "\n".join([*table_head(HEADS), *(table_line(row.cells()) for row in self.rows)])


def beside(stem: Path, kind: str) -> Path:
    """FILE.kind; a stem may have dots."""
    return stem.with_name(f"{stem.name}.{kind}")


def finished(stem: Path, like: dict[str, Any], cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Those of some cases of which earlier runs of the same kind left every figure."""
    file, there = beside(stem, "jsonl"), set[tuple[str, str, str]]()
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off
        if not row["failed"] and all(row.get(name) == value for name, value in like.items()):
            there.add((row["group"], row["case"], row["figure"]))
    return tuple(case for case in cases if {(case.group, case.name, _name(one)) for one in case.figures} <= there)


def table_head(heads: tuple[str, ...]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [table_line(list(heads)), "|---" * len(heads) + "|"]


def table_line(cells: list[str]) -> str:
    """A line of a Markdown table; a cell may hold any text."""
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |"


def empty_table(cases: tuple[Case, ...]) -> Iterator[str]:
    """The table of a run that has not been."""
    yield from table_head(("group", "case", "figure", "goal", "measured"))
    for case in cases:
        for one in case.figures:
            yield table_line([case.group, case.name, _name(one), str(one.goal or ""), "not measured"])


def _append(path: Path, text: str) -> None:
    if text:
        with path.open("a") as handle:
            handle.write(text)
            handle.flush()


def _ends_a_line(path: Path) -> bool:
    return not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
