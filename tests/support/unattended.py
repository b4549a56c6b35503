"""`deepfloyd ui` of a project, with its real processes, and the login to its server."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from polling import within
from prefect_api import PrefectApi

from flows.serving.home import password
from flows.serving.server import free_port

PATIENCE_S = 240.0  # a hang, not a measure of speed


@dataclass
class Ui:
    """`deepfloyd ui` of a project."""

    project: Path
    home: Path
    port: int = field(default_factory=free_port)
    environ: Mapping[str, str] = field(default_factory=dict)  # beside this process's
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def api(self) -> PrefectApi:
        """Its server's API."""
        return PrefectApi(f"http://127.0.0.1:{self.port}/api", password(self.home))

    @property
    def printed(self) -> str:
        """What it has printed since its last start."""
        return (self.project / "ui.log").read_text()

    def start(self) -> None:
        """Start it, and wait until its worker has started."""
        with (self.project / "ui.log").open("wb") as out:
            self.process = self._popen(out, "--port", str(self.port))
        assert within(PATIENCE_S, lambda: "Ctrl-C stops everything" in self.printed, every_s=0.3), self.printed

    def refused(self) -> tuple[int, str]:
        """The exit code and the output of a second one."""
        with (self.project / "second.log").open("wb") as out:
            code = self._popen(out).wait(60)
        return code, (self.project / "second.log").read_text()

    def stop(self, number: signal.Signals) -> None:
        """Send it a signal, and wait until it has ended."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def process_of(self, words: str) -> psutil.Process:
        """The descendant with these words in its command."""
        return next(process for process in self.processes() if words in _command(process))

    def processes(self) -> list[psutil.Process]:
        """Its descendants."""
        assert self.process is not None
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def _popen(self, out: Any, *arguments: str) -> "subprocess.Popen[bytes]":
        environ = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flows", "ui", *arguments],
            cwd=self.project, env=environ | {"PREFECT_HOME": str(self.home), **self.environ}, stdout=out, stderr=out,
        )  # fmt: skip


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""
