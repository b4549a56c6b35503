"""A starter of jobs that need no torch, run as `python -m job_functions`: what a job's process does, without its imports.

With DRIVER set it is one in which importing has reached for a GPU, as some libraries do.
"""

import atexit
import errno
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError

from deepfloyd_core.errors import Stop
from deepfloyd_core.processes import job_worker as job_process
from deepfloyd_core.processes import jobs
from deepfloyd_core.processes.jobs import Job


def pids(job: Job) -> dict[str, Any]:
    print("a line for the log", flush=True)
    return {"job": os.getpid(), "starter": os.getppid()}


def nap(job: Job) -> dict[str, Any]:
    """Until it is stopped, which it notes as a trainer writes its checkpoint."""
    job.report(1, 2, str(os.getpid()))
    try:
        time.sleep(60)
    except Stop:
        time.sleep(0.3)
        (job.out / "checkpoint").touch()
        raise
    return {}


def die(job: Job) -> dict[str, Any]:
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leave(job: Job) -> dict[str, Any]:
    """With an exit code: of the interpreter, or of a library."""
    print("the last words", flush=True)
    os._exit(int(job.options["captions"][0]))


def burst(job: Job) -> dict[str, Any]:
    """With an error of its own, by an interpreter that takes its time to end."""
    atexit.register(time.sleep, 0.5)
    raise RuntimeError("the last words")


def late(job: Job) -> dict[str, Any]:
    """Asked to end while its result is written: a second time, or when it had finished."""
    write = job_process.write_bytes

    def asked(path: Path, data: bytes) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(path, data)

    job_process.write_bytes = asked
    if job.options["captions"] == ["stopped"]:
        raise Stop
    return {"late": True}


def full(job: Job) -> dict[str, Any]:
    """As Python and as safetensors say it."""
    if job.options["captions"] == ["safetensors"]:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, "No space left on device")


def unreadable(job: Job) -> dict[str, Any]:
    raise PermissionError(errno.EACCES, "Permission denied", "/models/unet")


if __name__ == "__main__":
    jobs.JOBS.clear()
    jobs.JOBS |= {
        name: f"job_functions:{name}"
        for name in ("pids", "nap", "die", "leave", "burst", "embed", "full", "unreadable", "late")
    }
    if "DRIVER" in os.environ:
        sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(_is_in_bad_fork=lambda: True))  # type: ignore[assignment]
    job_process.main(*sys.argv[1:])
