"""`deepfloyd ui`: a Prefect server, a process worker and the deployments of prefect.yaml, on loopback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from deepfloyd_core.errors import ConfigError, JobError
from flows.server import default_home, prefect_server, stop_group

POOL = "deepfloyd"


def serve_ui(port: int, out: Console) -> None:
    """Run until Ctrl-C or SIGTERM, then stop all of it.

    Raises ConfigError when there is no prefect.yaml here, JobError when a part does not start.
    """
    if not Path("prefect.yaml").is_file():
        raise ConfigError(f"There is no prefect.yaml in {Path.cwd()}; run this from the project's directory.")
    signal.signal(signal.SIGTERM, _interrupt)
    home = default_home()
    with prefect_server(home, port) as url:
        # The folder `datasets` must not pass for Hugging Face's package in a flow's process.
        os.environ["PYTHONSAFEPATH"] = "1"
        _prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
        _prefect("--no-prompt", "deploy", "--all")
        with (home / "worker.log").open("ab") as log_file:
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"],
                stdin=subprocess.DEVNULL, stdout=log_file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        out.print(f"Prefect UI   {url.removesuffix('/api')}")
        out.print(f"In another terminal: PREFECT_API_URL={url} .venv/bin/prefect deployment run 'finetune/demo'")
        out.print(f"Worker's log {home / 'worker.log'}. Ctrl-C stops everything.")
        try:
            worker.wait()
        except KeyboardInterrupt:
            out.print("Stopping the worker and the server.")
            return
        finally:
            stop_group(worker.pid)
        raise JobError(f"The worker ended; its log is {home / 'worker.log'}.")


def _prefect(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "prefect", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise JobError(f"`prefect {' '.join(arguments)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
