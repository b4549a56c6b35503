"""The process worker of `deepfloyd ui`: bound to its process, and started again when it ends."""

import ctypes
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flows.serving.bound import OWNER
from flows.serving.home import PRIVATE
from flows.serving.processes import kill_below
from flows.serving.server_log import put_aside

log = logging.getLogger(__name__)

POOL = "deepfloyd"
STOP_S = 3.0  # how long the worker and its runs may take to end
SHORT_S, STARTS, PAUSE_S = 60.0, 5, 300.0
LARGEST_LOG = 32 << 20  # bytes; a larger one is put aside at the next start
_PR_SET_CHILD_SUBREAPER = 36


class Worker:
    """The worker's process. It ends with this one, and its runs with it (on macOS not those of a worker that was killed)."""

    def __init__(self, project: Path, log_path: Path) -> None:
        self._project, self._log = project, log_path
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
        ]
        self._began = time.monotonic()
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
def bound_worker(project: Path, log_path: Path) -> Iterator[Worker]:
    """A worker that runs in a project's folder until the end of the block."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # runs of a killed worker become this process's children
    worker = Worker(project, log_path)
    try:
        yield worker
    finally:
        worker.stop()
