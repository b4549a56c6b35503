"""The processes of a job, as their parent sees them: their files, start, progress, end.

A job has one process, or several that need each other: the ranks of a training.
"""

import json
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deepfloyd_core.config.base import Spec
from deepfloyd_core.errors import JobError, LostPeerError
from deepfloyd_core.processes.fork_server import ForkServer
from deepfloyd_core.types import Json, Report

POLL_S = 0.1
LINGER_S = 2.0  # how long the others may take to notice by themselves that a process of their job has failed


class JobResult(Spec):
    """The outcome of a job, as its process writes it: a summary, or the name and message of a DeepFloydError."""

    summary: Json | None = None
    error: str = ""
    message: str = ""
    is_stopped: bool = False  # it was asked to end, and has kept its work


@dataclass(frozen=True)
class JobFiles:
    """The files of a job's process, in the artifact's directory."""

    folder: Path
    name: str

    @property
    def request(self) -> Path:
        return self._path("request")

    @property
    def log(self) -> Path:
        return self._path("log")

    @property
    def progress(self) -> Path:
        return self._path("progress")

    @property
    def result(self) -> Path:
        return self._path("result")

    @property
    def meeting(self) -> Path:
        """Where the processes of one job find each other: no earlier try has left it."""
        return self._path("meeting")

    def outcome(self) -> JobResult | None:
        """What a process that is over has written; None: it died before."""
        return JobResult.model_validate_json(self.result.read_bytes()) if self.result.exists() else None

    def remove(self) -> None:
        """Remove what an earlier run has left."""
        self.remove_of_try()
        for path in (self.request, self.log):
            path.unlink(missing_ok=True)

    def remove_of_try(self) -> None:
        """Remove what a try has left that the next one writes anew."""
        for path in (self.progress, self.result, self.meeting):
            path.unlink(missing_ok=True)

    def _path(self, kind: str) -> Path:
        return self.folder / f".job-{self.name}.{kind}"


@dataclass(frozen=True)
class JobProcess:
    """A job's process. `line`: its other end is open as long as it lives."""

    starter: ForkServer
    pid: int
    line: socket.socket
    files: JobFiles


@dataclass(frozen=True)
class Order:
    """What the processes of a job are told beside their files."""

    kind: str  # MODULE:CLASS of its request
    gpu: int  # see `jobs.Job`


def start(starter: ForkServer, order: Order, files: JobFiles, held: Sequence[int]) -> JobProcess:
    """Start a job's process. held: open files whose locks it shares."""
    line, theirs = socket.socketpair()
    with files.log.open("ab") as log:
        try:
            with theirs:
                process = JobProcess(starter, starter.start(theirs.fileno(), log), line, files)
        except JobError:
            line.close()
            raise
        told = json.dumps([files.name, order.kind, str(files.folder.absolute()), order.gpu]).encode()
        with suppress(ConnectionError):  # it is dead already, which `follow` sees
            socket.send_fds(line, [told], [log.fileno(), *held])
    return process


class ProgressFile:
    """The progress of a job, as its process writes it. It is followed from any machine that has the folder."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def news(self) -> tuple[int, int, str] | None:
        """The newest report; None: there is none since the last call."""
        try:
            with self._path.open("rb") as handle:
                if handle.seek(0, os.SEEK_END) < self._position:
                    self._position = 0  # of another try
                handle.seek(self._position)
                lines = handle.read().split(b"\n")
        except FileNotFoundError:
            return None
        self._position += sum(len(line) + 1 for line in lines[:-1])
        if len(lines) == 1:
            return None
        done, total, line = json.loads(lines[-2])
        return done, total, line


def follow(processes: Sequence[JobProcess], report: Report) -> list[JobProcess]:
    """Report what the first process writes, until all have ended or one has failed. Returns those that have ended."""
    running, progress = list(processes), ProgressFile(processes[0].files.progress)
    while running:
        left = _still_running(running, POLL_S)
        ended, running = [process for process in running if process not in left], left
        if news := progress.news():
            report(*news)
        if running and any(innocence(process.files) < 2 for process in ended):
            running = _still_running(running, LINGER_S)
            break
    return [process for process in processes if process not in running]


def innocence(files: JobFiles) -> int:
    """How little a process that is over has to do with the end of its job: 0, it failed by itself; 1, it lost another one;
    2, it is well.
    """
    result = files.outcome()
    if result is None:
        return 0
    return 1 if result.error == LostPeerError.__name__ else 0 if result.error else 2


def stop(processes: Sequence[JobProcess], grace_s: float) -> dict[JobProcess, int | None]:
    """Let processes that still run write their last checkpoint. Returns the wait status of each, which is gone then; None
    where its fork server is gone too.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = _still_running(processes, 0)
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        if number == signal.SIGTERM and running:
            _still_running(running, grace_s)
    statuses = {process: process.starter.end(process.pid) for process in processes}
    for process in processes:
        process.line.close()
    return statuses


def _still_running(processes: Sequence[JobProcess], wait_s: float) -> list[JobProcess]:
    """Those that have not ended after a time. One process is waited for until it ends, of several until all have."""
    running, until = list(processes), time.monotonic() + wait_s
    while running:
        left_s = max(0.0, until - time.monotonic())
        lines = select.select([process.line for process in running], [], [], left_s)[0]  # nothing is written: the end
        if not lines:
            break
        running = [process for process in running if process.line not in lines]
    return running


def was_killed(status: int | None, files: JobFiles) -> bool:
    """Whether a job that is over was killed from outside: itself, or with its fork server, whose end stops it.

    status: of its process, None where it died with its fork server. A job that has written its result is killed as well,
    by us: that is over.
    """
    result = files.outcome()
    if status is None:
        return result is None or result.is_stopped
    return result is None and status == signal.SIGKILL
