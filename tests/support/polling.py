"""Waiting for what another process does."""

import time
from collections.abc import Callable


def slowness() -> float:
    """How many times longer than on an idle machine this process takes now: a second for which others have the cores too."""
    began, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.03:
        pass
    return max(1.0, (time.monotonic() - began) / 0.03)


def within(limit_s: float, done: Callable[[], bool], every_s: float = 0.01) -> bool:
    """Whether it is so before the time is over."""
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True
