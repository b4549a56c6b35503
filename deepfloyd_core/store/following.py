"""Looks at something again and again beside a block, in the block's context: what is made elsewhere tells its progress."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context


@contextmanager
def following(look: Callable[[], object], every_s: float) -> Iterator[None]:
    """Call a function every some seconds until the block ends."""
    ended, context = threading.Event(), copy_context()

    def follow() -> None:
        while not ended.wait(every_s):
            context.run(look)

    follower = threading.Thread(target=follow, name="following", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
