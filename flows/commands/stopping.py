"""Ends a command by SIGINT (Ctrl-C), SIGTERM or SIGHUP: within 5 s, with one sentence, leaving nothing running.

The first signal raises `Stopped` in the main thread, whose `finally` blocks stop jobs, which may write a checkpoint,
and report to Prefect. A thread also receives the signal, even while the main thread computes or another library has the
signal's handler (Prefect takes SIGTERM during a flow run). This thread ends the process when that takes too long, or at
a second signal.
"""

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from rich.console import Console

from flows.__main__ import answer_signals
from flows.commands.ending import SIGNALS, is_over
from flows.serving.processes import kill_below

GRACE_S = 3.0  # from the first signal to the end of what does not end by itself
SAME_S = 0.3  # `timeout` and others send a signal to a process and to its group: that is one
IMPORT_S = 0.05  # from a look whether an import is over to the next


class Stopped(BaseException):
    """Raised in the main thread by the first signal. Not a KeyboardInterrupt, which typer would answer by itself."""


class Stopping:
    """The end of a command by a signal. `kept`: tells the user what remains afterwards and how to continue."""

    def __init__(self, err: Console) -> None:
        self.kept = "Nothing was changed."
        self._err = err
        self._number = 0  # of the first signal
        self._raised = self._waits = False  # whether `Stopped` was raised, or waits for the end of an import
        self._code: int | None = None  # of a command that is over
        self._ending = threading.Lock()

    @property
    def asked(self) -> bool:
        """Whether a signal was received."""
        return self._number > 0

    def take_signals(self) -> None:
        """From now on signals end the command. Call it once, in the main thread."""
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a fork's signals are its own
        answer_signals(self._on_signal)
        threading.Thread(target=self._watch, args=(read_fd,), daemon=True, name="stopping").start()

    def finish(self, code: int) -> int:
        """The command is over. Returns its exit code, unless a signal was the reason: then the process ends here."""
        self._code = code
        is_over(code)
        if self.asked:
            self._end(at_once=False)
        return code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._code is not None:
            return
        self._number = self._number or number
        if self._raised:
            return
        if _imports(frame):  # libraries catch what is raised there, and print it
            signal.signal(signal.SIGALRM, self._on_signal)  # asks again
            signal.setitimer(signal.ITIMER_REAL, IMPORT_S)
            self._waits = True
            return
        self._raised = True
        raise Stopped(signal.Signals(self._number).name)

    def _watch(self, fd: int) -> NoReturn:
        began: float | None = None
        while True:
            left_s = None if began is None else max(began + GRACE_S - time.monotonic(), 0)
            if not select.select([fd], [], [], left_s)[0]:
                self._end(at_once=False)
            for number in os.read(fd, 64):
                if number not in SIGNALS:
                    continue
                if self._code is not None and not self.asked:
                    os._exit(self._code)  # the command was over, and has printed everything
                if began is None:
                    began, self._number = time.monotonic(), self._number or number
                # Prefect, which takes the first SIGTERM of a flow run, sends it again when the run is told.
                elif (self._raised or self._waits) and time.monotonic() > began + SAME_S:
                    self._end(at_once=True)

    def _end(self, at_once: bool) -> NoReturn:
        """Print the sentence and end this process, and those it has started; jobs may go on unless `at_once`."""
        if not self._ending.acquire(blocking=False):
            time.sleep(GRACE_S)  # the other thread ends the process
        jobs = kill_below(spare_jobs=not at_once)
        with suppress(OSError):  # SIGHUP: the terminal is gone
            sys.stdout.flush()
            self._err.show_cursor()  # progress bars hide it
            said = f"Stopped by {signal.Signals(self._number).name}. {self.kept}"
            said += " A job still writes its checkpoint, and then ends by itself." if jobs else ""
            self._err.print(said)
        os._exit(128 + self._number)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported by a frame or one that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
