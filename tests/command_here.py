"""The command line in a fork of the test process, and its jobs in that fork: nothing is imported again.

`deepfloyd run` imports Prefect, and each of its six to eight jobs imports torch: 10 s of CPU a process. Tests of what a run
makes, and not of its processes, need none of them; tests/test_flows.py and tests/test_killed_runs.py have them all.
"""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deepfloyd_core import jobs
from deepfloyd_core.artifacts import Artifact, WorkDir
from deepfloyd_core.config import RunConfig
from deepfloyd_core.types import Report, no_report

TIMEOUT_S = 600
_COMMANDS = "flows.cli", "flows.finetune", "flows.generate", "flows.stages"


def call_here(arguments: tuple[str, ...], folder: Path) -> "subprocess.CompletedProcess[str]":
    """What `deepfloyd ARGUMENTS`, started in this folder, returns and prints."""
    for name in (*_COMMANDS, *(function.split(":")[0] for function in jobs.JOBS.values())):
        importlib.import_module(name)
    with TemporaryDirectory() as made:
        printed = [Path(made, name) for name in ("out", "err")]
        process = multiprocessing.get_context("fork").Process(target=_main, args=(arguments, folder, printed))
        process.start()
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in printed))


def _main(arguments: tuple[str, ...], folder: Path, printed: list[Path]) -> None:
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(folder)
    sys.argv = ["deepfloyd", *arguments]
    for module in list(sys.modules.values()):
        if getattr(module, "run_job", None) is jobs.run_job and module is not jobs:
            module.run_job = _job_here  # type: ignore[attr-defined]
    jobs.run_job = _job_here
    _see_environment()
    from flows.cli import main

    main()


def _see_environment() -> None:
    """Prefect, which another test may have imported before there was a server, reads the environment again."""
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


def _job_here(
    name: str, config: RunConfig, inputs: dict[str, Artifact], options: dict[str, Any], work: WorkDir,
    report: Report = no_report,
) -> dict[str, Any]:  # fmt: skip
    """The job, given and returning what would have passed through the files of `run_job`."""
    given = RunConfig.model_validate(_as_json(config.model_dump(mode="json")))
    summary: dict[str, Any] = _as_json(
        jobs.job_function(name)(jobs.Job(given, inputs, _as_json(options), work.path, report))
    )
    return summary


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
