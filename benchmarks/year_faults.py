"""What breaks in the year, and how it is broken: real signals to real processes, and a disk that is really full."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from polling import within
from unattended import Ui

# Of 120 faults. A week is one fault: the worker does not answer for seven nights.
SHARES = {"run": 34, "job": 26, "worker": 20, "server": 14, "server away": 8, "ui": 8, "disk": 6, "week": 4}
WEEK = 7
MOST_SERVER_DEATHS = 4  # between two restarts of `ui`, which gives up for an hour after five within an hour
AWAY_S = 20.0
STRIKES_S = 60.0  # how long a fault waits for what it is to hit


def plan(faults: int, nights: int, busy: set[int], disk: bool, seed: int) -> dict[int, str]:
    """The fault of each night that has one. Half of them strike on nights on which something is made, while there are any,
    those of the disk among them.

    busy: nights on which something is made; disk: whether the disk can be filled. A week begins after the first night
    and takes the seven nights that begin with its own, none of which has another fault.
    """
    rng = np.random.default_rng([seed, 4])
    shares = {kind: share for kind, share in SHARES.items() if disk or kind != "disk"}
    total = sum(shares.values())
    kinds = [kind for kind, share in shares.items() for _ in range(round(faults * share / total))]
    kinds += ["run"] * (faults - len(kinds))
    planned: dict[int, str] = {}
    free = set(range(1, nights))
    for _ in range(kinds[:faults].count("week")):
        starts = [night for night in sorted(free) if {*range(night, night + WEEK)} <= free]
        start = int(rng.choice(starts))
        planned[start] = "week"
        free -= {*range(start - 1, start + WEEK + 1)}
    others = [str(kind) for kind in rng.permutation(kinds[:faults]) if kind != "week"]
    others.sort(key=lambda kind: kind != "disk")
    first = rng.permutation(sorted(free & busy))[: len(others) // 2]
    rest = rng.permutation(sorted(free - {int(night) for night in first}))
    by_night = dict(zip((int(night) for night in (*first, *rest)), others, strict=False))
    planned |= dict(zip(sorted(by_night), _in_order([by_night[night] for night in sorted(by_night)]), strict=True))
    return dict(sorted(planned.items()))


def _in_order(kinds: list[str]) -> list[str]:
    """The same faults, with a restart of `ui` after so many deaths of the server."""
    kinds, deaths = list(kinds), 0
    for at, kind in enumerate(kinds):
        deaths = 0 if kind == "ui" else deaths + (kind == "server")
        if deaths > MOST_SERVER_DEATHS and "ui" in kinds[at + 1 :]:
            other = kinds.index("ui", at + 1)
            kinds[at], kinds[other] = kinds[other], kinds[at]
            deaths = 0
    return kinds


@dataclass
class Breaker:
    """Breaks what a night runs on."""

    ui: Ui
    disk: "Disk | None"
    wait_s: Callable[[float], float]  # a random time up to this one

    def strike(self, kind: str, most_s: float, pid: Callable[[], int | None], over: Callable[[], bool]) -> str:
        """Break one thing at a random moment of the next `most_s`. pid: of the run, when it is under way; over: whether it
        has ended.

        Returns what was hit; empty if the run was over before.
        """
        if kind in ("run", "job"):
            return self._kill_below(most_s, pid, over, jobs=kind == "job")
        time.sleep(self.wait_s(most_s))
        if kind == "ui":
            self.ui.stop(signal.SIGKILL)
            time.sleep(self.wait_s(3.0))
            self.ui.start()
            return "`ui` killed, and started again"
        process = self.ui.process_of("worker start" if kind == "worker" else "server.users")
        if kind == "server away":
            with stopped(process):
                time.sleep(AWAY_S)
            return f"server away for {AWAY_S:.0f} s"
        process.kill()
        return f"{kind} killed"

    def _kill_below(self, most_s: float, pid: Callable[[], int | None], over: Callable[[], bool], jobs: bool) -> str:
        """SIGKILL to the run, or to a process below it, if it has one."""
        if within(STRIKES_S, lambda: pid() is not None or over(), every_s=0.1):
            time.sleep(self.wait_s(most_s))
            if run := pid():
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    below = psutil.Process(run).children(recursive=True) if jobs else []
                    target = below[int(self.wait_s(len(below)))].pid if below else run
                    os.kill(target, signal.SIGKILL)
                    return "job killed" if below else "run killed"
        return ""


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """In this block a process does not go on."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


@dataclass(frozen=True)
class Disk:
    """A small disk of its own."""

    folder: Path

    @contextmanager
    def full(self, room: int) -> Iterator[None]:
        """In this block so many bytes are free, or a page less."""
        filler = self.folder / ".filler"
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - room))
        try:
            yield
        finally:
            filler.unlink()
