"""The command line in a fork of the test process, and its jobs in forks of that fork: nothing is imported again.

`deepfloyd run` imports Prefect, and a process of its own imports torch for its jobs: 10 s of CPU each. Tests of what a run
makes, and not of its processes, need neither; tests/runs/test_flows.py and tests/runs/test_killed_runs.py have both.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

from training_parts import ONE_TIMESTEP

from deepfloyd_core.processes import ahead, jobs
from deepfloyd_core.processes import job_worker as job_process
from deepfloyd_core.training import eval_loss
from flows.serving.server import see_environment

TIMEOUT_S = 600
_COMMANDS = "flows.commands.cli", "flows.finetune", "flows.generate", "flows.stages"


def call_here(arguments: tuple[str, ...], folder: Path) -> "subprocess.CompletedProcess[str]":
    """What `deepfloyd ARGUMENTS`, started in this folder, returns and prints."""
    with TemporaryDirectory() as made:
        printed = Path(made, "out"), Path(made, "err")
        process = start_here(arguments, folder, printed)
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in printed))


def start_here(
    arguments: tuple[str, ...], folder: Path, printed: tuple[Path, Path]
) -> "multiprocessing.process.BaseProcess":
    """Begin it, in a session of its own. printed: where its two outputs are appended.

    Held-out losses are taken at one timestep: at all, they would be half of a small run. So a training does not go on from
    one of another process that has written losses.
    """
    for name in (*_COMMANDS, *ahead.ENTRIES):
        importlib.import_module(name)
    process = multiprocessing.get_context("fork").Process(target=_main, args=(arguments, folder, printed))
    process.start()
    return process


def _main(arguments: tuple[str, ...], folder: Path, printed: tuple[Path, Path]) -> None:
    os.setsid()
    eval_loss.TIMESTEPS = ONE_TIMESTEP  # type: ignore[assignment]
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(folder)
    sys.argv = ["deepfloyd", *arguments]
    ahead.ForkServer = ForkServerHere  # type: ignore[assignment, attr-defined]
    jobs.ForkServer = ForkServerHere  # type: ignore[assignment, attr-defined]
    see_environment()
    from flows.commands.cli import main

    main()


class ForkServerHere:
    """Forks this process for a job, which has imported all that a job needs."""

    is_closed = False

    def __init__(self, module: str, modules: str) -> None:
        assert module == job_process.__name__

    def open(self) -> None:
        """It has imported."""

    def start(self, fd: int, output: object) -> int:
        """As the real one."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                job_process.child(fd, parent)
            except SystemExit as end:
                os._exit(int(end.code or 0))
            finally:  # whatever else it raises would run the rest of the flow
                traceback.print_exc()
                os._exit(1)
        return pid

    def end(self, pid: int) -> int:
        """As the real one."""
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    def close(self) -> None:
        """It has no process."""
