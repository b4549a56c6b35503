"""Runs torch in child processes: the parent stays small, and a model's memory is freed when its job ends.

A job's request is a frozen model, declared without torch in the room that does the job. Its JSON, the log, the progress
and the result are dot files in the artifact's own directory, so a dead parent breaks no pipe. The child inherits the
artifact's lock, and gets SIGTERM when its parent dies: a trainer then writes a checkpoint, and owns its files until it
ends. The jobs of a flow are forks of one process (`job_worker`): so torch and diffusers, which take 4 s of CPU, are
imported once a flow and not once a job.
"""

import importlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from pydantic_core import to_json

from deepfloyd_core import errors
from deepfloyd_core.config.base import Spec
from deepfloyd_core.config.run_machine import Machine
from deepfloyd_core.errors import JobError
from deepfloyd_core.files import write_bytes
from deepfloyd_core.processes.ahead import ENTRIES, WORKER
from deepfloyd_core.processes.fork_server import ForkServer
from deepfloyd_core.processes.gpu_slot import slot_of_block
from deepfloyd_core.processes.job_processes import (
    POLL_S,
    JobFiles,
    JobProcess,
    Order,
    follow,
    innocence,
    start,
    stop,
    was_killed,
)
from deepfloyd_core.store.artifacts import WorkDir
from deepfloyd_core.store.file_faults import REFUSES_ALL, storage_error
from deepfloyd_core.store.manifest import Summary
from deepfloyd_core.types import Report, no_report

STORAGE = 100  # a job whose result the disk does not take either ends with this code + the error's number
TRIES = 2  # of a job that is killed from outside
STOP_GRACE_S = 60.0  # how long a job may take to write its last checkpoint
FAILED_GRACE_S = 10.0  # how long a process may take to end when another one of its job has failed
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
    gpu: int = 0  # number of the machine's GPU that is this job's, for one that shares them with others


def run_job(request: JobRequest[S], work: WorkDir, report: Report = no_report, part: str = "", gpu: int = 0) -> S:
    """Run one job in a child process and return its summary. part: distinguishes jobs of one kind that run at once; gpu: as
    in `Job`.

    A job that is killed by SIGKILL, as the kernel does where memory is short, is tried once more and goes on where it was.
    Raises the child's own DeepFloydError, or JobError with the end of its log when it died without one.
    """
    return run_together([request], work, report, part, gpu)


def run_together(requests: Sequence[JobRequest[S]], work: WorkDir, report: Report, part: str = "", gpu: int = 0) -> S:
    """`run_job` for a job of several processes that need each other. Returns the first's summary, and reports its progress.

    When one of them fails the others are ended, and its error is raised: a rank that waits for a dead one would wait long.
    """
    files = [write_request(request, work.path, part + (f"-{n}" if n else "")) for n, request in enumerate(requests)]
    slot = slot_of_block()
    return run_written(type(requests[0]), files, [work.lock_fd, *([slot.take()] if slot else [])], report, gpu)


def write_request(request: JobRequest[Any], folder: Path, part: str = "") -> JobFiles:
    """Write a job's request where its process reads it, and remove what an earlier job of its name has left."""
    files = JobFiles(folder, request.job + part)
    files.remove()
    # As bytes: one emoji in ten million captions makes a text four times as large.
    write_bytes(files.request, to_json(request))
    return files


def run_written(
    kind: type[JobRequest[S]], files: Sequence[JobFiles], held: Sequence[int], report: Report, gpu: int = 0
) -> S:
    """`run_together` for requests that are written. held: open files whose locks the processes share; gpu: as in `Job`."""
    with job_starter() as starter:
        for attempt in range(1, TRIES + 1):
            ended = _try(starter, Order(f"{kind.__module__}:{kind.__qualname__}", gpu), files, held, report)
            killed = [own.name for own, status in ended.items() if was_killed(status, own)]
            if attempt == TRIES or starter.is_closed or not killed:
                break
            log.warning("The %s job was killed by SIGKILL; it is tried once more, and goes on where it was.", killed[0])
            for own in files:
                own.remove_of_try()
    cause = min(ended, key=innocence)
    status = ended[cause]
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    return cast(S, _outcome(code, cause, kind.returns))


def _try(
    starter: ForkServer, order: Order, files: Sequence[JobFiles], held: Sequence[int], report: Report
) -> dict[JobFiles, int | None]:
    """Run the processes of a job. Returns the wait status of those that have ended by themselves: all, or when one failed
    those that ended with it.
    """
    processes, ended = list[JobProcess](), list[JobProcess]()
    try:
        for own in files:
            processes.append(start(starter, order, own, held))
        ended = follow(processes, report)
    finally:
        statuses = stop(processes, FAILED_GRACE_S if ended else STOP_GRACE_S)
    return {process.files: status for process, status in statuses.items() if process in ended}


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


def imported(name: str) -> Any:
    """The object that MODULE:NAME names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


P = TypeVar("P", bound=JobRequest[Any])


def part_requests(kind: type[P], request: JobRequest[Any], parts: int) -> list[P]:
    """The requests of parts 0 to `parts` - 1 of a job: each has the fields of its request, its `number`, and `parts`."""
    shared = {name: getattr(request, name) for name in type(request).model_fields}
    # Not validated again: each would have a tuple of all captions of its own.
    return [kind.model_construct(**shared, number=number, parts=parts) for number in range(parts)]


class RunParts(Protocol):
    """`run_parts`, or what has the parts made elsewhere."""

    def __call__(
        self, request: JobRequest[S], parts: Sequence[JobRequest[Any]], work: WorkDir, report: Report
    ) -> S: ...


def run_parts(request: JobRequest[S], parts: Sequence[JobRequest[Any]], work: WorkDir, report: Report) -> S:
    """Run jobs that make parts of an artifact, all at once, each in its own process; then run the job that needs all
    parts.
    """
    shown = [(0, 0, "")] * len(parts)

    def run_part(number: int) -> None:
        def show(done: int, total: int, line: str) -> None:
            shown[number] = done, total, line

        run_job(parts[number], work, show, f".{number}", number)

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


def _outcome(code: int, files: JobFiles, returns: type[Summary]) -> Summary:
    if result := files.outcome():
        if result.summary is None:
            raise getattr(errors, result.error)(result.message)
        return returns.of_record(result.summary, files.result)
    if code - STORAGE in REFUSES_ALL:
        raise storage_error(OSError(code - STORAGE, ""), "written", files.folder)
    tail = "\n".join(files.log.read_text(errors="replace").splitlines()[-15:])
    words = f"; it ends with:\n{tail}" if tail else ", which is empty."
    times = ", twice" if code == -signal.SIGKILL else ""
    died = f"was killed by {signal.Signals(-code).name}{times}" if code < 0 else f"ended with exit code {code}"
    hint = " The kernel kills a process that takes too much memory." if code == -signal.SIGKILL else ""
    raise JobError(f"The {files.name} job {died}.{hint} Its log is {files.log}{words}")
