"""Ends a Prefect server of ours that lives and answers nothing, so that it is started again (`server.kept_up`).

A server whose process was stopped, or that waits for itself, keeps its port and its lock: to all its users it is there. A
busy one answers late, so the question waits a minute, and several in a row must have had no answer at all.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from tasks.health import answers

log = logging.getLogger(__name__)

ASK_EVERY_S, PATIENCE_S, HUNG_S = 30.0, 60.0, 300.0


@dataclass
class Hearing:
    """Asks a server now and then whether it lives."""

    url: str
    ask: Callable[[str, float], bool] = answers
    heard: float = field(default_factory=time.monotonic)  # when it answered last
    asked: float = field(default_factory=time.monotonic)
    # Of this server: each keeps the times that it began with.
    every_s: float = field(default_factory=lambda: ASK_EVERY_S)
    patience_s: float = field(default_factory=lambda: PATIENCE_S)
    hung_s: float = field(default_factory=lambda: HUNG_S)

    def is_hung(self) -> bool:
        """Whether it has not answered for `hung_s`. Asks when it is time; may take `patience_s`."""
        if time.monotonic() - self.asked < self.every_s:
            return False
        if self.ask(self.url, self.patience_s):
            self.heard = time.monotonic()
        self.asked = time.monotonic()
        return self.asked - self.heard > self.hung_s

    def silent_s(self) -> float:
        """For how long it has not answered."""
        return time.monotonic() - self.heard

    def begin(self) -> None:
        """As if it had answered just now: another one begins."""
        self.heard = self.asked = time.monotonic()


def end_server(command: Iterable[str]) -> bool:
    """Kill this user's process that runs a command, also a stopped one. Returns whether there is one."""
    wanted, found = list(command)[1:], False  # without the interpreter, whose path may be a link
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().real == os.getuid() and process.cmdline()[1:] == wanted:
                process.kill()
                found = True
                process.wait(10)
    return found
