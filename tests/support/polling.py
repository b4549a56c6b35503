"""Waiting for what another process does."""

import time
from collections.abc import Callable


def within(limit_s: float, done: Callable[[], bool], every_s: float = 0.01) -> bool:
    """Whether it is so before the time is over."""
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True
