"""`deepfloyd ui`: a Prefect server, a process worker and the deployments of prefect.yaml, on loopback."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from deepfloyd_core.errors import ConfigError, JobError
from flows.api import check_guarded
from flows.bound import OWNER
from flows.home import PRIVATE, default_home, open_home
from flows.processes import kill_below
from flows.profile import prefect_command
from flows.proxies import past_proxy
from flows.server import page_address, prefect_server
from tasks.terminal import is_watched

POOL = "deepfloyd"
USUAL_PORT = 4200
STOP_S = 3.0  # how long the worker and its runs may take to end
_PR_SET_CHILD_SUBREAPER = 36


def serve_ui(port: int | None, out: Console) -> None:
    """Run until a signal ends it and everything that it started.

    Raises ConfigError when there is no prefect.yaml, or the server that is named lets anybody in; JobError when a part
    does not start.
    """
    home, project = default_home(), project_folder()
    before = past_proxy()
    open_home(home)
    with prefect_server(home, port, USUAL_PORT) as url:
        check_guarded(url)
        # The folder `datasets` must not pass for Hugging Face's package in a flow's process.
        os.environ["PYTHONSAFEPATH"] = "1"
        _prefect(project, "work-pool", "create", POOL, "--type", "process", "--overwrite")
        _prefect(project, "--no-prompt", "deploy", "--all")
        with _worker(project, home / "worker.log") as worker:
            out.print(f"Prefect UI   {page_address(url, home, is_watched(out))}")
            out.print(f"Deployments  {project / 'prefect.yaml'}")
            out.print(f"In another terminal: {before}{prefect_command(home, url)} deployment run 'finetune/demo'")
            out.print(f"Worker's log {home / 'worker.log'}. Ctrl-C stops everything.")
            worker.wait()
        raise JobError(f"The worker ended; its log is {home / 'worker.log'}.")


def project_folder(installed: Path = Path(__file__).parent.parent) -> Path:
    """The folder whose prefect.yaml is deployed: the current directory, else the folder that the package is installed
    from.
    """
    for folder in (Path.cwd(), installed):
        if (folder / "prefect.yaml").is_file():
            return folder
    raise ConfigError(
        f"There is no prefect.yaml in the current directory, {Path.cwd()}, nor in {installed}, where the package is. "
        "Run this from the project's directory."
    )


@contextmanager
def _worker(project: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker, which ends with this process, and its runs with it (on macOS not those of a worker that was killed)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # runs of a killed worker become this process's children
    command = [sys.executable, "-P", "-m", "flows.bound", OWNER, "prefect", "worker", "start", "--pool", POOL]
    with open(log, "ab", opener=PRIVATE) as log_file:
        worker = subprocess.Popen(
            command,
            cwd=project,
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield worker
    finally:
        assert worker.stdin is not None
        worker.stdin.close()  # it ends its runs, and itself
        with suppress(subprocess.TimeoutExpired):
            worker.wait(STOP_S)
        kill_below(spare_jobs=True)


def _prefect(project: Path, *arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "prefect", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise JobError(f"`prefect {' '.join(arguments)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
