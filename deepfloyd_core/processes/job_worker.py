"""The other end of `jobs`: a fork server that imports what jobs need, torch first, and the child processes that do jobs.

Some libraries cannot be forked after use: a GPU driver cannot, nor can most libraries of macOS. Then a child starts as
a new program, and imports everything again.
"""

import importlib
import json
import logging
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from safetensors import SafetensorError

from deepfloyd_core.errors import DeepFloydError, Stop
from deepfloyd_core.files import write_bytes
from deepfloyd_core.processes.collector import collect_later
from deepfloyd_core.processes.fork_server import die_with, fork_on_command
from deepfloyd_core.processes.job_processes import JobResult
from deepfloyd_core.processes.jobs import STORAGE, Job, JobRequest, imported
from deepfloyd_core.store.file_faults import FULL, REFUSES_ALL, storage_error, system_error
from deepfloyd_core.store.manifest import Summary

_FORKS = sys.platform == "linux"
_ORDER_BYTES = 65536
# What transformers, diffusers and accelerate import where it is installed, for what no job has: 1 s.
NOT_USED = ("boto3", "scipy", "sklearn")


def main(control_fd: str, modules: str) -> None:
    """Entry of the starter, which imports modules; each of its forks does one job."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # may be sent to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    if _FORKS:
        with collect_later():
            import_for_jobs(modules.split())
    starter = os.getpid()
    line_fd = fork_on_command(int(control_fd), signal.SIGTERM)
    if line_fd is None:
        os._exit(0)  # the run waits for it: torch takes 0.2 s to be taken down
    if _FORKS and not _driver_is_in_use():
        child(line_fd, starter)
    os.set_inheritable(line_fd, True)
    # -P: the current directory holds a folder `datasets`, which must not pass for Hugging Face's package.
    command = [sys.executable, "-P", "-m", "deepfloyd_core.processes.job_worker", "--child", str(line_fd), str(starter)]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an ignored signal would stay ignored in the new program
    os.execv(sys.executable, command)


def import_for_jobs(modules: list[str]) -> None:
    """Import modules as in an installation without NOT_USED. A job may still import those."""
    for name in NOT_USED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # this is how Python says "not here"
    for module in modules:
        importlib.import_module(module)
    for name in NOT_USED:
        if sys.modules[name] is None:
            del sys.modules[name]


def child(line_fd: int, starter: int) -> NoReturn:
    """Do the job that arrives over a socket, which stays open until this process ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(starter, signal.SIGTERM)
    line = socket.socket(fileno=line_fd)
    order, fds, _, _ = socket.recv_fds(line, _ORDER_BYTES, 3)
    line.detach()  # after an error it is open until the process is gone: at its end the parent kills
    if not order:
        sys.exit(1)  # the parent is gone
    log_fd, *_locks = fds  # holding a file open holds its lock
    for number in (1, 2):
        os.dup2(log_fd, number)
    os.close(log_fd)
    name, kind, folder, gpu = json.loads(order)
    code = do(name, kind, Path(folder), gpu)
    os.close(line_fd)  # the result is there: the parent need not wait for the interpreter's end
    sys.exit(code)


def do(name: str, kind: str, out: Path, gpu: int) -> int:
    """Do the job whose request is in a folder, and write its result to that folder. kind: MODULE:CLASS of the request.
    gpu: as in `Job`.

    Returns the exit code. A disk that does not take the result either is told by the code: the log may be full as well.
    """
    try:
        result = _result(name, kind, out, gpu)
        # The job is over: a process that asks it to end still wants its result.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        write_bytes(out / f".job-{name}.result", result.model_dump_json().encode())
    except OSError as error:
        if error.errno not in REFUSES_ALL:
            raise
        os._exit(STORAGE + error.errno)  # at once: the interpreter's end would write to the log
    return 1 if result.error else 0


def _result(name: str, kind: str, out: Path, gpu: int) -> JobResult:
    """Do the job. Raises OSError where its own files cannot be read or written."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    request: JobRequest[Any] = imported(kind).model_validate_json((out / f".job-{name}.request").read_bytes())
    signal.signal(signal.SIGTERM, _on_sigterm)
    progress = (out / f".job-{name}.progress").open("w")

    def report(done: int, total: int, line: str) -> None:
        progress.write(json.dumps([done, total, line]) + "\n")
        progress.flush()

    try:
        summary: Summary | None = imported(request.entry)(Job(request, out, report, gpu))
        return JobResult(summary=None if summary is None else summary.record)  # of a job's other processes
    except DeepFloydError as error:
        return JobResult(error=type(error).__name__, message=str(error))
    except Stop:
        words = f"The {name} job was stopped; run it again to continue."
        return JobResult(error="JobError", message=words, is_stopped=True)
    except MemoryError:
        traceback.print_exc()
        return JobResult(error="JobError", message=f"The {name} job ran out of memory; its log is in {out}.")
    except (OSError, SafetensorError) as error:
        refused = error if isinstance(error, OSError) else system_error(str(error))
        if refused is None:
            raise
        with suppress(OSError):  # the log may be on the same disk
            traceback.print_exc()
        act = "written" if refused.errno in FULL else "used"
        return JobResult(error="StorageError", message=str(storage_error(refused, act, out)))


def _driver_is_in_use() -> bool:
    """Whether importing has initialised a GPU driver: some libraries look for GPUs. Only a fork can tell."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda._is_in_bad_fork())


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the checkpoint being written must not be cut
    raise Stop


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*map(int, sys.argv[2:]))
    main(*sys.argv[1:])
