"""The other end of `jobs`: a starter that imports what jobs need, torch first, and the children that do them.

Libraries that were used cannot always be forked: a GPU's driver cannot, nor can most of macOS. A child of such a process
begins anew, as a program of its own, and takes the time of the imports again.
"""

import gc
import importlib
import json
import logging
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from safetensors import SafetensorError

from deepfloyd_core.config.run import RunConfig
from deepfloyd_core.errors import DeepFloydError, Stop
from deepfloyd_core.files import write_bytes
from deepfloyd_core.processes.fork_server import die_with, fork_on_command
from deepfloyd_core.processes.jobs import JOBS, STORAGE, Job, job_function
from deepfloyd_core.store.artifacts import Artifact
from deepfloyd_core.store.file_faults import FULL, storage_error, system_error

_FORKS = sys.platform == "linux"
_REQUEST_BYTES = 65536


def main(control_fd: str, _: str) -> None:
    """Entry of the starter; each of its forks does one job."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # may reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    if _FORKS:
        for function in JOBS.values():
            importlib.import_module(function.split(":")[0])
        gc.freeze()  # the collector would write to pages that the children share
    starter = os.getpid()
    line_fd = fork_on_command(int(control_fd), signal.SIGTERM)
    if line_fd is None:
        return
    if _FORKS and not _driver_is_in_use():
        child(line_fd, starter)
    os.set_inheritable(line_fd, True)
    # -P: the current directory holds a folder `datasets`, which must not pass for Hugging Face's package.
    command = [sys.executable, "-P", "-m", "deepfloyd_core.processes.job_worker", "--child", str(line_fd), str(starter)]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what is ignored stays so in another program
    os.execv(sys.executable, command)


def child(line_fd: int, starter: int) -> NoReturn:
    """Do the job that comes over a line, which is open until this process ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with(starter, signal.SIGTERM)
    line = socket.socket(fileno=line_fd)
    request, fds, _, _ = socket.recv_fds(line, _REQUEST_BYTES, 2)
    line.detach()  # after an error it is open until the process is gone: at its end the parent kills
    if not request:
        sys.exit(1)  # the parent is gone
    log_fd, _lock_fd = fds  # the lock is held by being open
    for number in (1, 2):
        os.dup2(log_fd, number)
    os.close(log_fd)
    name, folder = json.loads(request)
    code = do(name, Path(folder))
    os.close(line_fd)  # the result is there: the parent need not wait for the interpreter's end
    sys.exit(code)


def do(name: str, out: Path) -> int:
    """Do the job whose request is in a folder, and write its result there. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    request = json.loads((out / f".job-{name}.request").read_bytes())
    signal.signal(signal.SIGTERM, _on_sigterm)
    progress = (out / f".job-{name}.progress").open("w")

    def report(done: int, total: int, line: str) -> None:
        progress.write(json.dumps([done, total, line]) + "\n")
        progress.flush()

    inputs = {key: Artifact(kind, fp, Path(path)) for key, (kind, fp, path) in request["inputs"].items()}
    job = Job(RunConfig.model_validate(request["config"]), inputs, request["options"], out, report)
    result: dict[str, Any] = {"error": None, "message": None, "summary": None}
    try:
        result["summary"] = job_function(name)(job)
    except DeepFloydError as error:
        result |= {"error": type(error).__name__, "message": str(error)}
    except Stop:
        result |= {"error": "JobError", "message": f"The {name} job was stopped; run it again to continue."}
    except MemoryError:
        traceback.print_exc()
        result |= {"error": "JobError", "message": f"The {name} job ran out of memory; its log is in {out}."}
    except (OSError, SafetensorError) as error:
        refused = error if isinstance(error, OSError) else system_error(str(error))
        if refused is None:
            raise
        if refused.errno in FULL:  # a result could not be written either
            os._exit(
                STORAGE + refused.errno
            )  # at once: the parent hears of the interpreter's end, and kills, before it is over
        traceback.print_exc()
        result |= {"error": "StorageError", "message": str(storage_error(refused, "used", out))}
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # the job is over: whoever asks it to end wants its result all the same
    write_bytes(out / f".job-{name}.result", json.dumps(result).encode())
    return 0 if result["error"] is None else 1


def _driver_is_in_use() -> bool:
    """Whether importing has reached for a GPU: some libraries look what there is. Known in a fork alone."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda._is_in_bad_fork())


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the checkpoint being written must not be cut
    raise Stop


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*map(int, sys.argv[2:]))
    main(*sys.argv[1:])
