"""A starter of jobs that need no torch, run as `python -m job_functions`: what a job's process does, without its imports.

With DRIVER set it is one in which importing has reached for a GPU, as some libraries do; with SLOW_STARTS one start for each
file of a folder takes long.
"""

import atexit
import errno
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError

from deepfloyd_core.errors import Stop
from deepfloyd_core.files import write_bytes
from deepfloyd_core.processes import job_worker
from deepfloyd_core.processes.jobs import Job, JobRequest
from deepfloyd_core.store.manifest import Summary


class Pids(Summary):
    """Of the processes of a job."""

    job: int = 0
    starter: int = 0
    late: int = 0


class Order(JobRequest[Pids]):
    """Which function of this module is to be called."""

    job = "work"
    entry = "job_functions:do"
    returns = Pids
    function: str
    words: str = "x"


def pids(job: Job[Order]) -> Pids:
    print("a line for the log", flush=True)
    return Pids(job=os.getpid(), starter=os.getppid())


def nap(job: Job[Order]) -> Pids:
    """Until it is stopped, which it notes as a trainer writes its checkpoint. With one it has little left to do."""
    if (job.out / "checkpoint").exists():
        return Pids(late=1)
    job.report(1, 2, str(os.getpid()))
    try:
        time.sleep(60)
    except Stop:
        time.sleep(0.3)
        (job.out / "checkpoint").touch()
        raise
    return Pids()


def die(job: Job[Order]) -> Pids:
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return Pids()


def die_once(job: Job[Order]) -> Pids:
    """As it does where memory is short for a while."""
    if not (job.out / "checkpoint").exists():
        (job.out / "checkpoint").touch()
        return die(job)
    return pids(job)


def leave(job: Job[Order]) -> Pids:
    """With an exit code: of the interpreter, or of a library."""
    print("the last words", flush=True)
    os._exit(int(job.request.words))


def burst(job: Job[Order]) -> Pids:
    """With an error of its own, by an interpreter that takes its time to end."""
    atexit.register(time.sleep, 0.5)
    raise RuntimeError("the last words")


def late(job: Job[Order]) -> Pids:
    """Asked to end while its result is written: a second time, or when it had finished."""

    def asked(path: Path, data: bytes) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_bytes(path, data)

    job_worker.write_bytes = asked  # type: ignore[attr-defined]
    if job.request.words == "stopped":
        raise Stop
    return Pids(late=1)


def full(job: Job[Order]) -> Pids:
    """As Python and as safetensors say it."""
    if job.request.words == "safetensors":
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, "No space left on device")


def fuller(job: Job[Order]) -> Pids:
    """A disk that takes nothing any more, no result either: of `words`, the number of its error."""
    number = int(job.request.words)

    def refused(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    job_worker.write_bytes = refused  # type: ignore[attr-defined]
    raise OSError(number, os.strerror(number))


def unreadable(job: Job[Order]) -> Pids:
    raise PermissionError(errno.EACCES, "Permission denied", "/models/unet")


def do(job: Job[Order]) -> Pids:
    """The function of this module that is asked for."""
    made: Pids = globals()[job.request.function](job)
    return made


if __name__ == "__main__":
    for file in sorted(Path(os.environ.get("SLOW_STARTS", "/nowhere")).glob("*"))[:1]:
        file.unlink()
        time.sleep(60)  # as imports can take
    if "DRIVER" in os.environ:
        sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(_is_in_bad_fork=lambda: True))  # type: ignore[assignment]
    job_worker.main(*sys.argv[1:])
