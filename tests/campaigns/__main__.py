"""`make attack`: runs each campaign of this folder for its part of the time, prints one table, and exits 1 on a failure.

A campaign is a module here that defines `attack(seconds, seed, folder) -> list[Row]`; `SHARE` is its weight where the time
is shared out (1 where it has none). Each runs in a process of its own, as many at once as there are cores, so that what
one replaces in its process (`os.fsync`, a timer) reaches no other.
"""

import argparse
import importlib
import os
import re
import shutil
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rows import Row

HERE = Path(__file__).parent
BEGIN, END = "<!-- make attack: begin -->", "<!-- make attack: end -->"


def campaigns() -> dict[str, int]:
    """Names of the campaigns, and the share of each, largest first. Read from the text: an import takes seconds."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        text = path.read_text()
        if re.search(r"^def attack\(", text, re.MULTILINE):
            share = re.search(r"^SHARE = (\d+)$", text, re.MULTILINE)
            found[path.stem] = int(share[1]) if share else 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def run_one(name: str, seconds: float, seed: int, folder: Path) -> list[Row]:
    """The rows of one campaign; what ends the campaign itself is a failure of its own."""
    folder.mkdir()
    try:
        rows: list[Row] = importlib.import_module(name).attack(seconds, seed, folder)
    except Exception:  # a campaign that broke has shown nothing, and the others go on
        return [Row(f"the campaign `{name}` itself", 1, 1, [traceback.format_exc()])]
    return rows


def run_all(names: dict[str, int], seconds: float, seed: int, folder: Path) -> list[Row]:
    """The rows of these campaigns, which together take about so many seconds of wall time."""
    workers = min(len(os.sched_getaffinity(0)), len(names))
    unit = seconds * workers / sum(names.values())
    longest = min(seconds, unit * max(names.values()))
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
        running = [
            pool.submit(run_one, name, min(unit * share, longest), seed, folder / name) for name, share in names.items()
        ]
        return [row for each in running for row in each.result()]


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with their sum."""
    every = [*rows, Row("**all**", sum(row.tried for row in rows), sum(row.failed for row in rows), [])]
    lines = [f"| {row.kind} | {row.tried:,} | {row.failed:,} |" for row in every]
    return "\n".join(["| kind | tried | failed |", "|---|---:|---:|", *lines])


def write_table(path: Path, text: str) -> None:
    """Replace what stands between the two markers of a document."""
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main(words: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description="Attacks this code for a stated time.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", metavar="CAMPAIGN", choices=sorted(campaigns()))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this document")
    asked = parser.parse_args(words)
    names = {name: share for name, share in campaigns().items() if asked.only is None or name in asked.only}
    folder = Path(tempfile.mkdtemp(prefix="deepfloyd-attack-"))
    rows = run_all(names, asked.seconds, asked.seed, folder)
    print(f"seed {asked.seed}, {asked.seconds:,.0f} s\n\n{table(rows)}")
    for row in rows:
        for failure in row.failures:
            print(f"\n{row.kind}: {failure}", file=sys.stderr)
    if asked.write:
        stated = f"`make attack SECONDS={asked.seconds:.0f} SEED={asked.seed}`:"
        write_table(asked.write, f"{stated}\n\n{table(rows)}")
    if any(row.failed for row in rows):
        print(f"\nFailing inputs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
