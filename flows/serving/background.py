"""Runs a thread for as long as a block takes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meanwhile(name: str, loop: Callable[[threading.Event], None], patience_s: float | None = None) -> Iterator[None]:
    """Run a loop in a thread until the end of the block; the loop must end soon after the event is set.

    patience_s: how long the end of the block waits for it; None: until it has ended.
    """
    ended = threading.Event()
    thread = threading.Thread(target=loop, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(patience_s)
