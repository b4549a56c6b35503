"""The other end of `children`: the starter, and the children that it forks.

The starter knows no threads and runs no decoder, so it always hears when its parent is gone, and kills the children. A
child's clock is a kernel timer whose signal kills (1 us an item), for a decoder that never comes back to the interpreter.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = 75  # exit code of a child
_PR_SET_PDEATHSIG = 1


def main(request: str) -> None:
    """Entry of the starter; each child it forks comes out of `_fork_on_command` with its connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    fd, memory_mib, seconds, preload, sys.path[:] = json.loads(request)
    for name in preload:
        importlib.import_module(name)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    starter = os.getpid()
    connection = _fork_on_command(socket.socket(fileno=fd))
    if connection:
        _die_with(starter)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a thousand killers would leave a thousand memory images
        _answer(connection, memory_mib, seconds)


def _fork_on_command(control: socket.socket) -> "Connection[Any, Any] | None":
    """Start and end children until the parent is gone; None then, and in each child its connection."""
    living: set[int] = set()
    with control, contextlib.suppress(ConnectionError):
        while True:
            command, fds, _, _ = socket.recv_fds(control, 32, 1)
            if not command:
                break
            if fds:
                answer = os.fork()
                if answer == 0:
                    return Connection(fds[0])
                os.close(fds[0])
                living.add(answer)
            else:
                living.discard(int(command))
                answer = _kill(int(command))
            control.send(b"%d" % answer)
    for pid in living:
        _kill(pid)
    return None


def _kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)  # the status of one that is dead already stays what it is
    return os.waitpid(pid, 0)[1]


def _die_with(starter: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != starter:  # it died before the line above
        sys.exit(1)


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
    main(sys.argv[1])
