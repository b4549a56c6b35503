"""Cases in a process of their own, that has a time limit: what it yields, or how it ended, becomes rows.

The process is a fork of one that has imported torch and has not touched the card, which saves the 10 s of the imports;
where importing did touch it, a fork begins anew. Cases that share a process run until one fails: the rest gets a new one,
for after a failure on a GPU nothing in a process can be trusted.
"""

import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from gpu_plan import Asked, Case
from gpu_results import Results, failure, measured

SPARE_S = 3.0  # of the budget, for the last lines


class Watch:
    """The parent's side of one process: reads what its cases say, each within its time."""

    def __init__(self, cases: Sequence[Case], results: Results, ends_at: float, judged: bool, slack: float) -> None:
        """ends_at: when the budget is spent, by time.monotonic; slack: times a case's limit."""
        self.cases, self.results, self.ends_at, self.judged, self.slack = cases, results, ends_at, judged, slack
        self.done = 0  # cases that ended, well or not
        self.left = False  # whether the process has said that it does no more
        self._began, self._rest = time.monotonic(), b""

    @property
    def left_s(self) -> float:
        """Of the time of the case in hand, or of the budget."""
        limit = self.cases[self.done].limit_s * self.slack
        return min(self._began + limit, self.ends_at - SPARE_S) - time.monotonic()

    def read(self, fd: int) -> None:
        """Take what the process says, until it has no case left, one failed or took too long, or it died."""
        while self.left_s > 0:
            if not select.select([fd], [], [], max(0.0, self.left_s))[0]:
                break
            data = os.read(fd, 1 << 16)
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(*json.loads(line))
            if self.left:
                return
        seconds, spent = time.monotonic() - self._began, time.monotonic() > self.ends_at - SPARE_S - 0.1
        self.ended(
            f"took more than {seconds:.0f} s" if not spent else f"cut off after {seconds:.0f} s: the budget is spent"
        )
        self.left = True

    def ended(self, message: str) -> None:
        """The case in hand ended without its figures."""
        self.results.add(failure(self.cases[self.done], message, time.monotonic() - self._began))
        self._next()

    def _take(self, kind: str, *said: Any) -> None:
        if kind == "figure":
            case = self.cases[self.done]
            what, value, note = said
            seconds = time.monotonic() - self._began
            self.results.add(measured(case, what, float(value), note, seconds, self.judged))
            print(f"  {case.group} {case.name}: {what} {float(value):.4g} {note}", flush=True)
        elif kind == "failed":
            self.ended(str(said[0]))
        elif kind == "done":
            self._next()
        else:
            self.left = True

    def _next(self) -> None:
        self.done, self._began = self.done + 1, time.monotonic()
        self.left = self.left or self.done == len(self.cases)


def run_process(watch: Watch, asked: Asked, log: Path, again: Callable[[int], list[str]], anew: bool = False) -> None:
    """Run a watch's cases in a new process until all ended, one failed, or the time is over.

    again: the command that does them, given a pipe's number, in a process that begins anew; anew: begin anew in any case.
    """
    read_fd, write_fd = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        _child(watch.cases, asked, write_fd, log, parent, again(write_fd), anew)
    os.close(write_fd)
    try:
        watch.read(read_fd)
    finally:
        os.close(read_fd)
        status = _end(pid)
    if not watch.left:
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        watch.ended(f"its process ended by {how}")


def _end(pid: int) -> int:
    """Kill a child and its group, to which the loaders and compilers belong that it started. Returns its exit code."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(
    cases: Sequence[Case], asked: Asked, fd: int, log: Path, parent: int, command: list[str], anew: bool
) -> NoReturn:
    """Do cases and leave, whatever happens: nothing of the parent's must be done twice."""
    try:
        os.setsid()
        _die_with(parent)
        with log.open("ab") as handle:
            for number in (1, 2):
                os.dup2(handle.fileno(), number)
        torch = sys.modules.get("torch")
        if anew or (asked.device == "cuda" and torch is not None and torch.cuda._is_in_bad_fork()):
            os.set_inheritable(fd, True)
            os.execv(command[0], command)
        do_cases(cases, asked, fd)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def do_cases(cases: Sequence[Case], asked: Asked, fd: int) -> None:
    """Run cases one after the other, in this process, up to the first that fails; what they yield goes into a pipe."""

    def say(*said: Any) -> None:
        os.write(fd, (json.dumps(said) + "\n").encode())

    for case in cases:
        print(f"== {case.group} {case.name}", flush=True)
        try:
            module, function = case.call.split(":")
            for figure in getattr(importlib.import_module(module), function)(asked, **case.options):
                say("figure", *figure)
        except BaseException as error:  # a case may do anything, also exit
            traceback.print_exc()
            last = "".join(traceback.format_exception_only(error)).strip().splitlines()
            say("failed", last[-1] if last else type(error).__name__)
            break
        say("done")
    say("left")


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
