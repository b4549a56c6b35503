"""Runs `python -m MODULE ARGUMENTS` in a process that ends when its last user has ended, however that user died.

The kernel reports the end: each user of a server holds a shared lock on a file; the owner of a worker holds the other
end of its standard input. A thread of the process itself watches this. So there is no second process that could be
lost, and no process id read from a file that may belong to another process by now.
"""

import fcntl
import importlib
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deepfloyd_core.processes.collector import collect_later
from flows.serving.processes import end_runs

OWNER = "-"  # in place of a lock's path: standard input
POLL_S = 0.1
RUNS_S, REPORT_S = 2.0, 0.7  # how long the runs of a worker may take to end, and the worker to tell the server of it
ITSELF_S = 3.5  # a server writes what it has in memory, and waits for connections that a browser holds open


def main(users: str, module: str, *arguments: str) -> None:
    """Run a module in this process until it ends, or has no users left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script has started with `&`
    alone = partial(_owner_gone, os.dup(0)) if users == OWNER else partial(_lock_free, Path(users))
    if users == OWNER:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_watch, args=(alone,), daemon=True).start()
    sys.argv = [module, *arguments]
    with collect_later():
        importlib.import_module(
            module
        )  # what it imports; it lives for weeks, so the collector then looks as often as ever
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _watch(alone: Callable[[], None]) -> None:
    alone()
    if end_runs(RUNS_S):
        time.sleep(REPORT_S)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ITSELF_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _lock_free(path: Path) -> None:
    """Return when nobody holds the lock. This process then keeps it, so that a newcomer waits for its end."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it is held; or the disk fails for a moment, which must not make this process endless
            time.sleep(POLL_S)
        else:
            return


def _owner_gone(fd: int) -> None:
    while os.read(fd, 1):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
