"""A process that imports modules once and forks a child on command: 8 ms instead of imports (4 s of CPU for diffusers).

It has no threads and does nothing else. So it always notices when its parent is gone, and then ends its children.
multiprocessing's fork server does not: it outlives a killed parent as long as a child lives. It also imports the
caller's __main__ into each child.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import IO

from deepfloyd_core.errors import JobError

_GRACE_S = 10.0  # it ends at once, unless a job writes a checkpoint
_PR_SET_PDEATHSIG = 1


class ForkServer:
    """The parent's end. The fork server starts with the first child; it ends when this is closed or this process is
    killed.
    """

    def __init__(self, module: str, request: str = "", own_group: bool = False) -> None:
        """`module` is run with the number of its end's file and `request`, and calls `fork_on_command`.

        own_group: Ctrl-C and Ctrl-Z are for this process alone.
        """
        self._command = [sys.executable, "-P", "-m", module]
        self._request, self._group = request, 0 if own_group else None
        self._lock = threading.Lock()  # it answers one command at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._children: set[int] = set()  # of this fork server, not of one before it
        self._closed = False
        self._imported = False
        self._early: IO[bytes] | None = None  # what it writes, if it was opened before its first child

    @property
    def pid(self) -> int | None:
        """Process id of the fork server, while it runs."""
        return self._process.pid if self._process else None

    @property
    def is_closed(self) -> bool:
        """Whether it starts no more children."""
        return self._closed

    def open(self) -> None:
        """Start the fork server before its first child: it imports while this process does something else."""
        with self._lock, contextlib.suppress(OSError):  # the first child tries again, and tells
            if self._process is None and not self._closed:
                self._early = tempfile.TemporaryFile()  # noqa: SIM115
                self._open(self._early)

    def start(self, fd: int, output: IO[bytes] | None = None) -> int:
        """Fork a child that inherits a file. Returns its pid. output: where the fork server itself writes, if it starts now,
        or has written until it ended.

        A fork server that was killed is replaced, once. Raises JobError when that is killed too, when one ends by itself
        before its first answer, and after `close`.
        """
        with self._lock:
            for is_replaced in (False, True):
                answer = self._ask(b"start", (fd,), output)
                if answer is not None:
                    self._children.add(answer)
                    return answer
                self._tell(output)
                if not self._forget() or is_replaced:
                    break
        raise JobError("The server that starts child processes has ended; its output shows why, unless it was killed.")

    def end(self, pid: int) -> int | None:
        """Kill a child unless it is already dead, and forget it. Returns its wait status; None: not known, because the fork
        server is gone, which takes its children along.
        """
        with self._lock:
            known = pid in self._children
            self._children.discard(pid)
            return self._ask(b"%d" % pid) if known else None

    def close(self) -> None:
        """End the fork server and its children. May be called more than once, also while a thread is starting it."""
        self._closed = True
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # it reads its end, and so does a thread that waits for it
        try:
            process.wait(_GRACE_S if self._imported else 0)  # it has no children yet, and would import for seconds
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _ask(self, command: bytes, fds: tuple[int, ...] = (), output: IO[bytes] | None = None) -> int | None:
        """The answer; None when the fork server is gone."""
        with contextlib.suppress(OSError):
            if self._closed:
                return None
            if self._process is None:
                self._open(output)
            socket.send_fds(self._control, [command], fds)
            if answer := self._control.recv(32):
                self._imported = True
                return int(answer)
        return None

    def _tell(self, output: IO[bytes] | None) -> None:
        """Copy what an early fork server has written."""
        early, self._early = self._early, None
        if early is not None:
            with early:
                early.seek(0)
                if output is not None:
                    output.write(early.read())
                    output.flush()

    def _forget(self) -> bool:
        """Let the next child have a fork server of its own. Returns whether that makes sense: this one worked, or was
        killed.
        """
        process, self._process = self._process, None
        if process is None or self._closed:
            return False
        self._control.close()
        self._children.clear()
        try:
            code = process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        worked, self._imported = self._imported, False
        return worked or code == -signal.SIGKILL

    def _open(self, output: IO[bytes] | None) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), self._request], stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, pass_fds=(theirs.fileno(),), process_group=self._group,
            )  # fmt: skip


def fork_on_command(control_fd: int, last: signal.Signals) -> int | None:
    """The other end: start and end children until the parent is gone. Returns in each child, with the file that it inherits.

    When the parent is gone, the children get the signal `last`. In the fork server it returns None when they have
    ended, however long a job takes to finish its step and write its last checkpoint.
    """
    living: set[int] = set()
    with socket.socket(fileno=control_fd) as control, contextlib.suppress(ConnectionError):
        while True:
            command, fds, _, _ = socket.recv_fds(control, 32, 1)
            if not command:
                break
            if fds:
                answer = os.fork()
                if answer == 0:
                    return fds[0]
                os.close(fds[0])
                living.add(answer)
            else:
                living.discard(int(command))
                os.kill(int(command), signal.SIGKILL)  # the status of one that is dead already stays what it is
                answer = os.waitpid(int(command), 0)[1]
            control.send(b"%d" % answer)
    for pid in living:
        os.kill(pid, last)
    for pid in living:
        os.waitpid(pid, 0)
    return None


def die_with(parent: int, by: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux); exit when it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
