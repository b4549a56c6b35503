"""Kills and failures at every call of the file system that a commit makes, and power losses after each of them.

For each act (`acts`) and each of its calls: SIGKILL before it; it fails with EIO; from it on the disk is full, or over its
quota, or a write is cut in half first. What is left must be the old or the new, whole; an error must be one sentence that
names the place; and the next run must end with the bytes of an undisturbed one. No call is left out, whatever the time.
A power loss (`power_loss`) is judged in the same way, by every tree of files that the model allows.
"""

import errno
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from acts import Act
from file_calls import Call, End, How, Watcher, compile_library, watched_environment
from power_loss import Tree, crashed_trees, read_tree, write_tree
from rows import Row

SHARE = 1
ALL = "acts:light_acts", "heavy_acts:heavy_acts"  # MODULE:FUNCTION, which makes acts in a folder
_MOST = 5  # failures that are told of a row
_FAULTS = (
    ("killed before a call", How.KILL, 0),
    ("a call fails", How.FAIL, errno.EIO),
    ("a full disk", How.FULL, errno.ENOSPC),
    ("a used-up quota in the middle of a write", How.SHORT, errno.EDQUOT),
)
POWER = "power lost"


def attack(seconds: float, seed: int, folder: Path) -> list[Row]:
    """Every call once: the time and the seed choose nothing. The acts are done in a process that is watched."""
    return attacked(ALL, folder)


def attacked(groups: Sequence[str], folder: Path) -> list[Row]:
    """The rows of some groups of acts."""
    library = compile_library(folder)
    with tempfile.TemporaryDirectory(dir=_fast(folder)) as place:
        command = [sys.executable, "-P", __file__, place, *groups]
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")])
        environment = watched_environment(library) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def _fast(folder: Path) -> Path:
    """A place in memory, if there is one: nothing here is flushed."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else folder


# ---- in the watched process -----------------------------------------------------------------------------------------------


def swept(act: Act, watcher: Watcher, scratch: Path) -> list[Row]:
    """The rows of one act: one for each fault, and one for power losses."""
    before = read_tree(act.folder)
    total = watcher.count(act.folder, act.do)
    rows = [
        _row(f"{act.kind}: {name}", _ends(act, watcher, before, total, how, number)) for name, how, number in _FAULTS
    ]
    _restore(act.folder, before)
    calls = watcher.record(act.folder, act.do, scratch)
    return [*rows, _row(f"{act.kind}: {POWER}", _crashes(act, before, calls))]


def _row(kind: str, outcomes: Iterator[str]) -> Row:
    """outcomes: of each trial what it broke; empty: nothing."""
    told = list(outcomes)
    failures = [outcome for outcome in told if outcome]
    return Row(kind, len(told), len(failures), failures[:_MOST])


def _ends(act: Act, watcher: Watcher, before: Tree, total: int, how: How, number: int) -> Iterator[str]:
    for at in range(total):
        _restore(act.folder, before)
        end = watcher.end(act.folder, act.do, how, at, number)
        yield _broken(lambda end=end: _judge(act, end, how, number), f"call {at} of {total}")  # type: ignore[misc]


def _judge(act: Act, end: End, how: How, number: int) -> None:
    killed = end.signal == 9 and how == How.KILL
    assert killed or not end.signal, f"signal {end.signal}"
    if end.error:
        name, _, text = end.error.partition(": ")
        assert name in ("StorageError", "ArtifactError"), end.error
        assert os.strerror(number).lower() in text.lower() or " less room " in text, end.error
        assert str(act.folder) in text and "[Errno" not in text and "/.tmp-" not in text, end.error
    act.check()


def _crashes(act: Act, before: Tree, calls: Sequence[Call]) -> Iterator[str]:
    for number, tree in enumerate(crashed_trees(act.folder, before, calls)):
        _restore(act.folder, tree)
        yield _broken(act.check, f"state {number}", tree)


def _broken(judge: Callable[[], None], where: str, tree: Tree | None = None) -> str:
    """What a check found, and where; empty: nothing. tree: what it found it in."""
    try:
        judge()
    except Exception:  # whatever the next run raises is a failure of the one before
        files = [f"{name} {-1 if data is None else len(data)}" for name, data in sorted((tree or {}).items())]
        return "\n".join([f"{where}: {traceback.format_exc(limit=-4)}", *files])
    return ""


def _restore(folder: Path, tree: Tree) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_tree(folder, tree)


def main(place: str, *groups: str) -> None:
    """Sweep the acts of some groups, and print their rows as JSON."""
    logging.disable(logging.CRITICAL)
    folder, watcher, rows = Path(place), Watcher(), []
    for group in groups:
        module, _, function = group.partition(":")  # the second takes torch
        for act in getattr(importlib.import_module(module), function)(folder / function):
            rows += swept(act, watcher, folder / "calls")
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
