"""The other end of `pool`: the fork server, which imports the modules, and the worker processes that it forks.

A kernel timer limits the time of each item: its signal kills the worker (1 us an item), even when a decoder never
returns to the interpreter.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from deepfloyd_core.processes.fork_server import die_with, fork_on_command

OUT_OF_MEMORY = 75  # exit code of a child


def main(control_fd: str, request: str) -> None:
    """Entry of the starter; each child it forks comes out of `fork_on_command` with its connection."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    memory_mib, seconds, preload, sys.path[:] = json.loads(request)
    for name in preload:
        importlib.import_module(name)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    starter = os.getpid()
    fd = fork_on_command(int(control_fd), signal.SIGKILL)
    if fd is not None:
        die_with(starter, signal.SIGKILL)
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno()
        )  # libtiff and others write what they think of a file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a thousand killers would leave a thousand memory images
        _answer(Connection(fd), memory_mib, seconds)


def _answer(connection: "Connection[Any, Any]", memory_mib: int | None, seconds: float) -> None:
    """A child's life: requests of a function and items, an answer for each item."""
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        with contextlib.ExitStack() as stack:
            stack.push(partial(_tell, connection))
            function, items = ForkingPickler.loads(request)
            if memory_mib is not None:
                _cap_memory(memory_mib)
                memory_mib = None  # once, when the first function's imports are done
            for item in items:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                result = function(item)
                signal.setitimer(signal.ITIMER_REAL, 0)  # not while sending: the parent may be busy, or stopped
                connection.send((True, result))


def _cap_memory(mib: int) -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize() + (mib << 20)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        finite = [limit for limit in limits if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([size, *finite]), limits[1]))


def _tell(connection: "Connection[Any, Any]", kind: object, error: BaseException | None, trace: object) -> bool:
    """Send the parent whatever the function raised, in parts: not every exception survives pickling as a whole."""
    if isinstance(error, MemoryError):
        os._exit(OUT_OF_MEMORY)  # also while a request or a result was pickled, which no function can handle
    if error is None:
        return False
    if not isinstance(error, Exception):
        os._exit(1)  # sys.exit is a death like any other
    signal.setitimer(signal.ITIMER_REAL, 0)
    text = "In a child process:\n" + "".join(traceback.format_exception(error))
    error.add_note(text)
    with contextlib.ExitStack() as stack:
        stack.push(partial(_tell_text, connection, text))
        connection.send((False, error.__reduce__()))
    return True


def _tell_text(connection: "Connection[Any, Any]", text: str, kind: object, failure: object, trace: object) -> bool:
    with contextlib.suppress(ConnectionError):  # the parent is gone or going; the next read ends this process
        if failure:
            connection.send((False, (RuntimeError, (text,))))
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
