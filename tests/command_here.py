"""The command line in a fork of the test process, and its jobs in that fork: nothing is imported again.

`deepfloyd run` imports Prefect, and each of its six to eight jobs imports torch: 10 s of CPU a process. Tests of what a run
makes, and not of its processes, need none of them; tests/test_flows.py and tests/test_killed_runs.py have them all.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from deepfloyd_core import jobs

TIMEOUT_S = 600
_COMMANDS = "flows.cli", "flows.finetune", "flows.generate", "flows.stages"


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
    """Begin it, in a session of its own. printed: where its two outputs are appended."""
    for name in (*_COMMANDS, *(function.split(":")[0] for function in jobs.JOBS.values())):
        importlib.import_module(name)
    process = multiprocessing.get_context("fork").Process(target=_main, args=(arguments, folder, printed))
    process.start()
    return process


def _main(arguments: tuple[str, ...], folder: Path, printed: tuple[Path, Path]) -> None:
    os.setsid()
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(folder)
    sys.argv = ["deepfloyd", *arguments]
    jobs.subprocess = SimpleNamespace(Popen=_ChildHere, DEVNULL=-1, STDOUT=-1)  # type: ignore[assignment, attr-defined]
    jobs._die_with_parent = lambda parent: None
    _see_environment()
    from flows.cli import main

    main()


def _see_environment() -> None:
    """Prefect, which another test may have imported before there was a server, reads the environment again."""
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


class _ChildHere:
    """The child process of a job: its own entry, called here. Its request, progress and result pass through their files."""

    def __init__(self, command: list[str], **_: Any) -> None:
        number = signal.SIGTERM, signal.SIGINT
        before = [signal.getsignal(one) for one in number]
        self.returncode = jobs.main(*command[-2:])
        for one, handler in zip(number, before, strict=True):
            signal.signal(one, handler)

    def poll(self) -> int:
        """It has ended."""
        return self.returncode
