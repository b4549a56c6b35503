"""Python's garbage collector during imports: they make a million objects that stay, and it would look at them in vain."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

AT_ONCE = 50_000  # objects; Python's own is 700


def collect_seldom() -> None:
    """For the process of a command, which imports first and ends soon: a tenth less CPU for Prefect. Called before."""
    gc.set_threshold(AT_ONCE)


@contextmanager
def collect_later() -> Iterator[None]:
    """Around the imports of a process that forks, or lives long: a fifth less CPU for torch and diffusers.

    The collector never looks at what was made in the block: it would write to pages that the children share.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
