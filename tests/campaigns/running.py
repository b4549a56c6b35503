"""Finds the campaigns and runs each in a process of its own; not in `__main__`, which those processes cannot import."""

import importlib
import os
import re
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rows import Row

HERE = Path(__file__).parent


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
