"""Runs torch in child processes: the parent stays small, and a model's memory is freed when its job ends.

A job's request is a frozen model, declared without torch in the room that does the job. Its JSON, the log, the progress
and the result are dot files in the artifact's own directory, so a dead parent breaks no pipe. The child inherits the
artifact's lock, and gets SIGTERM when its parent dies: a trainer then writes a checkpoint, and owns its files until it
ends. The jobs of a flow are forks of one process (`job_worker`): so torch and diffusers, which take 4 s of CPU, are
imported once a flow and not once a job.
"""

import importlib
import json
import logging
import os
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, TypeVar, cast

from pydantic_core import to_json

from deepfloyd_core import errors
from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.errors import JobError
from deepfloyd_core.files import write_bytes
from deepfloyd_core.processes.ahead import ENTRIES, WORKER
from deepfloyd_core.processes.fork_server import ForkServer
from deepfloyd_core.processes.gpu_slot import slot_of_block
from deepfloyd_core.store.artifacts import WorkDir
from deepfloyd_core.store.file_faults import REFUSES_ALL, storage_error
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.types import Json, Report, no_report

STORAGE = 100  # a job whose result the disk does not take either ends with this code + the error's number
POLL_S = 0.1
TRIES = 2  # of a job that is killed from outside
STOP_GRACE_S = 60.0  # how long a job may take to write its last checkpoint
log = logging.getLogger(__name__)
_STARTER: "ContextVar[ForkServer | None]" = ContextVar("job_starter", default=None)


S = TypeVar("S", bound=Summary)


class JobRequest(Spec, Generic[S]):
    """The request of a job: everything that it reads, as plain values, groups of keys and artifacts."""

    job: ClassVar[str]  # its name in messages
    entry: ClassVar[str]  # MODULE:FUNCTION, which takes a Job of the request and returns the summary
    returns: ClassVar[type[Summary]]  # S
    machine: Machine


R = TypeVar("R", bound=JobRequest[Any], covariant=True)


@dataclass(frozen=True)
class Job(Generic[R]):
    """The argument of a job's function."""

    request: R
    out: Path
    report: Report


def run_job(request: JobRequest[S], work: WorkDir, report: Report = no_report, part: str = "") -> S:
    """Run one job in a child process and return its summary. part: distinguishes jobs of one kind that run at once.

    A job that is killed by SIGKILL, as the kernel does where memory is short, is tried once more and goes on where it was.
    Raises the child's own DeepFloydError, or JobError with the end of its log when it died without one.
    """
    name = request.job + part
    paths = {file: work.path / f".job-{name}.{file}" for file in ("request", "log", "progress", "result")}
    for path in paths.values():
        path.unlink(missing_ok=True)
    # As bytes: one emoji in ten million captions makes a text four times as large.
    write_bytes(paths["request"], to_json(request))
    slot = slot_of_block()
    held = [work.lock_fd, *([slot.take()] if slot else [])]
    with job_starter() as starter:
        for attempt in range(1, TRIES + 1):
            with paths["log"].open("ab") as file:
                child = _start(starter, name, type(request), work, file, held)
            try:
                _follow(child, paths["progress"], report)
            finally:
                status = _stop(child)
            if attempt == TRIES or starter.is_closed or not _was_killed(status, paths["result"]):
                break
            log.warning("The %s job was killed by SIGKILL; it is tried once more, and goes on where it was.", name)
            for file_of_try in (paths["progress"], paths["result"]):
                file_of_try.unlink(missing_ok=True)
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    return cast(S, _outcome(name, code, paths, request.returns))


class JobResult(Spec):
    """The outcome of a job, as its process writes it: a summary, or the name and message of a DeepFloydError."""

    summary: Json | None = None
    error: str = ""
    message: str = ""
    is_stopped: bool = False  # it was asked to end, and has kept its work


@contextmanager
def job_starter(modules: Sequence[str] = ENTRIES, ahead: ForkServer | None = None) -> Iterator[ForkServer]:
    """The jobs of this block are forks of one process, which starts with the first job. Nested blocks share the outer
    one. modules: what it imports; a job imports by itself what is left out. ahead: one that runs already.
    """
    if outer := _STARTER.get():
        yield outer
        return
    starter = ahead or ForkServer(WORKER, " ".join(modules))
    token = _STARTER.set(starter)
    try:
        yield starter
    finally:
        _STARTER.reset(token)
        starter.close()


@contextmanager
def warm_job_starter(modules: Sequence[str]) -> Iterator[None]:
    """`job_starter` for what will surely have a job: its process begins to import at once, beside whatever comes first."""
    with job_starter(modules) as starter:
        starter.open()
        yield


@dataclass(frozen=True)
class _Child:
    """A job's process. `line`: its other end is open as long as it lives."""

    starter: ForkServer
    pid: int
    line: socket.socket


def _start(
    starter: ForkServer, name: str, kind: type[JobRequest[Any]], work: WorkDir, log: IO[bytes], held: list[int]
) -> _Child:
    """held: open files whose locks the child shares."""
    line, theirs = socket.socketpair()
    try:
        with theirs:
            child = _Child(starter, starter.start(theirs.fileno(), log), line)
    except JobError:
        line.close()
        raise
    order = json.dumps([name, f"{kind.__module__}:{kind.__qualname__}", str(work.path.absolute())]).encode()
    with suppress(ConnectionError):  # it is dead already, which `_follow` sees
        socket.send_fds(line, [order], [log.fileno(), *held])
    return child


def imported(name: str) -> Any:
    """The object that MODULE:NAME names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def run_parts(request: JobRequest[S], parts: Sequence[JobRequest[Any]], work: WorkDir, report: Report) -> S:
    """Run jobs that make parts of an artifact, all at once, each in its own process; then run the job that needs all
    parts.
    """
    shown = [(0, 0, "")] * len(parts)

    def run_part(number: int) -> None:
        def show(done: int, total: int, line: str) -> None:
            shown[number] = done, total, line

        run_job(parts[number], work, show, f".{number}")

    if not parts:
        return run_job(request, work, report)
    if slot := slot_of_block():
        slot.take()  # once, not in each thread
    with job_starter() as starter:
        with ThreadPoolExecutor(len(parts)) as pool, ExitStack() as unfinished:
            unfinished.callback(starter.close)  # a run that is asked to end ends its parts, for which the pool waits
            running = [pool.submit(copy_context().run, run_part, number) for number in range(len(parts))]
            # Reports go out from the caller's thread, which has Prefect's context.
            while wait(running, POLL_S).not_done:
                done, total, lines = zip(*shown, strict=True)
                report(sum(done), sum(total), f"{lines[0]} in each of {len(parts)} processes")
            unfinished.pop_all()
        for part in running:
            part.result()
        return run_job(request, work, report)


def _follow(child: _Child, progress: Path, report: Report) -> None:
    """Report what the job writes until it has ended."""
    position = 0
    running = True
    while running:
        running = not _ended(child, POLL_S)
        if progress.exists():
            with progress.open("rb") as handle:
                handle.seek(position)
                lines = handle.read().split(b"\n")
            position += sum(len(line) + 1 for line in lines[:-1])
            if len(lines) > 1:
                done, total, line = json.loads(lines[-2])
                report(done, total, line)


def _ended(child: _Child, wait_s: float) -> bool:
    return bool(select.select([child.line], [], [], wait_s)[0])  # it writes nothing: this is the end of its file


def _stop(child: _Child) -> int | None:
    """Let a job that still runs write its last checkpoint. Returns the wait status of its process, which is gone then; None
    where its fork server is gone too.
    """
    with child.line:
        if not _ended(child, 0):
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
            if not _ended(child, STOP_GRACE_S):
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
    return child.starter.end(child.pid)


def _was_killed(status: int | None, file: Path) -> bool:
    """Whether a job that is over was killed from outside: itself, or with its fork server, whose end stops it.

    status: of its process, None where it died with its fork server. A job that has written its result is killed as well,
    by us: that is over.
    """
    result = JobResult.model_validate_json(file.read_bytes()) if file.exists() else None
    if status is None:
        return result is None or result.is_stopped
    return result is None and status == signal.SIGKILL


def _outcome(name: str, code: int, paths: dict[str, Path], returns: type[Summary]) -> Summary:
    if paths["result"].exists():
        result = JobResult.model_validate_json(paths["result"].read_bytes())
        if result.summary is None:
            raise getattr(errors, result.error)(result.message)
        return returns.of_record(result.summary, paths["result"])
    if code - STORAGE in REFUSES_ALL:
        raise storage_error(OSError(code - STORAGE, ""), "written", paths["result"].parent)
    tail = "\n".join(paths["log"].read_text(errors="replace").splitlines()[-15:])
    words = f"; it ends with:\n{tail}" if tail else ", which is empty."
    times = ", twice" if code == -signal.SIGKILL else ""
    died = f"was killed by {signal.Signals(-code).name}{times}" if code < 0 else f"ended with exit code {code}"
    hint = " The kernel kills a process that takes too much memory." if code == -signal.SIGKILL else ""
    raise JobError(f"The {name} job {died}.{hint} Its log is {paths['log']}{words}")
