"""The process worker of `deepfloyd ui`: bound to its process, and started again when it ends."""

import ctypes
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from deepfloyd_core.files import write_bytes
from flows.serving.bound import OWNER
from flows.serving.home import PRIVATE
from flows.serving.processes import kill_below
from flows.serving.server_log import put_aside

log = logging.getLogger(__name__)

POOL = "deepfloyd"
NAME, LOG = "worker.name", "worker.log"  # files of a home
STOP_S = 3.0  # how long the worker and its runs may take to end
SHORT_S, STARTS, PAUSE_S = 60.0, 5, 300.0
LARGEST_LOG = 32 << 20  # bytes; a larger one is put aside at the next start
_PR_SET_CHILD_SUBREAPER = 36


def worker_name(home: Path) -> str:
    """The name of a home's worker, on every server and after every restart: by it the home knows its runs.

    It is kept in the home, because a container has another host name after each start.
    """
    file = home / NAME
    if not file.exists():
        write_bytes(file, f"{socket.gethostname()} {uuid4().hex[:8]}".encode())
    return file.read_text()


class Worker:
    """The worker's process. It ends with this one, and its runs with it (on macOS not those of a worker that was killed).

    since: when it was started last.
    """

    def __init__(self, project: Path, home: Path) -> None:
        self._project, self._log, self._name = project, home / LOG, worker_name(home)
        self._short, self._not_before = 0, 0.0
        self._start()

    def _start(self) -> None:
        command = [
            sys.executable,
            "-P",
            "-m",
            "flows.serving.bound",
            OWNER,
            "prefect",
            "worker",
            "start",
            "--pool",
            POOL,
            "--name",
            self._name,
        ]
        self._began, self.since = time.monotonic(), datetime.now(UTC)
        put_aside(self._log, LARGEST_LOG)
        with open(self._log, "ab", opener=PRIVATE) as log_file:
            self._process = subprocess.Popen(
                command,
                cwd=self._project,
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def keep_up(self, server_answers: bool) -> None:
        """Start it again when it has ended; not while the server is away, for it would end at once.

        One that ends again and again, within SHORT_S, is started every PAUSE_S.
        """
        code = self._process.poll()
        if code is None or not server_answers or time.monotonic() < self._not_before:
            return
        self._short = self._short + 1 if time.monotonic() - self._began < SHORT_S else 0
        if self._short >= STARTS:
            self._not_before = time.monotonic() + PAUSE_S
        log.warning("the worker has ended with code %d; it is started again (log: %s)", code, self._log)
        try:
            self._start()
        except OSError as error:  # no memory, or no more processes
            log.warning("the worker cannot be started: %s", error)

    def stop(self) -> None:
        """End it and its runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # it ends its runs, and itself
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        kill_below(spare_jobs=True)


@contextmanager
def bound_worker(project: Path, home: Path) -> Iterator[Worker]:
    """The worker of a home, which runs in a project's folder until the end of the block."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # runs of a killed worker become this process's children
    worker = Worker(project, home)
    try:
        yield worker
    finally:
        worker.stop()
