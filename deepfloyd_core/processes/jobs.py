"""Torch runs in child processes: the parent stays small, a model's memory is gone when its job ends.

The request, the log, the progress and the result are dot files in the artifact's own directory, so a dead parent breaks
no pipe. The child inherits the artifact's lock and gets SIGTERM when its parent dies: a trainer then writes a checkpoint
and still owns its files until it is gone. The jobs of a flow are forks of one process (`job_process`), so that torch and
diffusers are imported once a flow, which takes 5 to 12 s, and not once a job.
"""

import importlib
import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deepfloyd_core import errors
from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.errors import JobError
from deepfloyd_core.files import write_bytes
from deepfloyd_core.processes.fork_server import Starter
from deepfloyd_core.store.artifacts import Artifact, WorkDir
from deepfloyd_core.store.file_faults import FULL, storage_error
from deepfloyd_core.types import Report, no_report

JOBS = {
    "embed": "deepfloyd_core.text.encode:embed_job",
    "project": "deepfloyd_core.text.projection:project_job",
    "remake": "deepfloyd_core.sampling.remakes:remake_job",
    "train": "deepfloyd_core.training.trainer:train_job",
    "sample": "deepfloyd_core.sampling.cascade:samples_job",
    "generate": "deepfloyd_core.sampling.generate:generate_job",
}
STORAGE = 100  # a job that could not write its result, for want of space, ends with this code + the error's number
POLL_S = 0.1
STOP_GRACE_S = 60.0  # how long a job may take to write its last checkpoint
_STARTER: "ContextVar[Starter | None]" = ContextVar("job_starter", default=None)


@dataclass(frozen=True)
class Job:
    """What a job's function gets."""

    config: RunConfig
    inputs: dict[str, Artifact]
    options: dict[str, Any]
    out: Path
    report: Report


def run_job(
    name: str, config: RunConfig, inputs: dict[str, Artifact], options: dict[str, Any], work: WorkDir,
    report: Report = no_report,
) -> dict[str, Any]:  # fmt: skip
    """Run one job in a child process and return its summary. `name`: of JOBS; several at once add a number, `embed.1`.

    Raises the child's own DeepFloydError, or JobError with the end of its log when it died without one.
    """
    paths = {part: work.path / f".job-{name}.{part}" for part in ("request", "log", "progress", "result")}
    for path in paths.values():
        path.unlink(missing_ok=True)
    request = {
        "config": config.model_dump(mode="json"),
        "inputs": {key: [item.kind, item.fingerprint, str(item.path)] for key, item in inputs.items()},
        "options": options,
    }
    write_bytes(paths["request"], json.dumps(request).encode())
    with job_starter() as starter:
        with paths["log"].open("wb") as log:
            child = _start(starter, name, work, log)
        try:
            _follow(child, paths["progress"], report)
        finally:
            status = _stop(child)
    return _outcome(name, os.waitstatus_to_exitcode(status), paths)


@contextmanager
def job_starter() -> Iterator[Starter]:
    """The jobs of this block are forks of one process, which begins with the first. A block within another has its one."""
    if outer := _STARTER.get():
        yield outer
        return
    starter = Starter("deepfloyd_core.processes.job_worker")
    token = _STARTER.set(starter)
    try:
        yield starter
    finally:
        _STARTER.reset(token)
        starter.close()


@dataclass(frozen=True)
class _Child:
    """A job's process. `line`: its other end is open as long as it lives."""

    starter: Starter
    pid: int
    line: socket.socket


def _start(starter: Starter, name: str, work: WorkDir, log: IO[bytes]) -> _Child:
    line, theirs = socket.socketpair()
    try:
        with theirs:
            child = _Child(starter, starter.start(theirs.fileno(), log), line)
    except JobError:
        line.close()
        raise
    job = json.dumps([name, str(work.path.absolute())]).encode()
    socket.send_fds(line, [job], [log.fileno(), work.lock_fd])
    return child


def job_function(name: str) -> Callable[[Job], dict[str, Any]]:
    """What does a job of JOBS, imported now; `name` may have a number, as in `run_job`."""
    module, function = JOBS[name.split(".")[0]].split(":")
    found: Callable[[Job], dict[str, Any]] = getattr(importlib.import_module(module), function)
    return found


def run_parts(
    name: str, config: RunConfig, inputs: dict[str, Artifact], options: dict[str, Any], work: WorkDir, report: Report
) -> dict[str, Any]:
    """Run a job whose parts `embed_workers` processes make at once, then once more for what is made of all of them."""
    count = config.embed_workers
    shown = [(0, 0, "")] * count

    def run_part(number: int) -> None:
        def show(done: int, total: int, line: str) -> None:
            shown[number] = done, total, line

        run_job(f"{name}.{number}", config, inputs, {**options, "part": [number, count]}, work, show)

    if count == 1:
        return run_job(name, config, inputs, options, work, report)
    with job_starter():
        with ThreadPoolExecutor(count) as pool:
            parts = [pool.submit(copy_context().run, run_part, number) for number in range(count)]
            while wait(parts, POLL_S).not_done:  # reports go out from the caller's thread, which has Prefect's context
                done, total, lines = zip(*shown, strict=True)
                report(sum(done), sum(total), f"{lines[0]} in each of {count} processes")
        for part in parts:
            part.result()
        return run_job(name, config, inputs, options, work, report)


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


def _stop(child: _Child) -> int:
    """Let a job that still runs write its last checkpoint. Returns the wait status of its process, which is gone then."""
    with child.line:
        if not _ended(child, 0):
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
            _ended(child, STOP_GRACE_S)
    return child.starter.end(child.pid)


def _outcome(name: str, code: int, paths: dict[str, Path]) -> dict[str, Any]:
    result = json.loads(paths["result"].read_bytes()) if paths["result"].exists() else None
    if result is not None and result["error"] is None:
        return dict(result["summary"])
    if result is not None:
        raise getattr(errors, result["error"])(result["message"])
    if code - STORAGE in FULL:
        raise storage_error(OSError(code - STORAGE, ""), "written", paths["result"].parent)
    tail = "\n".join(paths["log"].read_text(errors="replace").splitlines()[-15:])
    words = f"; it ends with:\n{tail}" if tail else ", which is empty."
    died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " The kernel kills a process that takes too much memory." if code == -signal.SIGKILL else ""
    raise JobError(f"The {name} job {died}.{hint} Its log is {paths['log']}{words}")
