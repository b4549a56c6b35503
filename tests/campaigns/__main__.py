"""`make attack`: runs each campaign of this folder for its part of the time, prints one table, and exits 1 on a failure.

A campaign is a module here that defines `attack(seconds, seed, folder) -> list[Row]`; `SHARE` is its weight where the time
is shared out (1 where it has none). Each runs in a process of its own, as many at once as there are cores, so that what
one replaces in its process (`os.fsync`, a timer) reaches no other.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from rows import Row
from running import campaigns, run_all

BEGIN, END = "<!-- make attack: begin -->", "<!-- make attack: end -->"


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
