"""Flipped bits in copies of files: what reads them says so, or gives what the whole file gives."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from deepfloyd_core.errors import DamagedError
from deepfloyd_core.store import damage

R = TypeVar("R")


def flip(file: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of a file, which keeps its inode, its size and its times."""
    times = file.stat()
    with file.open("r+b") as handle:
        handle.seek(place)
        (byte,) = handle.read(1)
        handle.seek(place)
        handle.write(bytes([byte ^ 1 << bit]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextmanager
def flipped(file: Path, place: int, bit: int = 0) -> Iterator[None]:
    """`flip` for the time of a block."""
    flip(file, place, bit)
    try:
        yield
    finally:
        flip(file, place, bit)


def times_found(
    file: Path, places: range | list[int], seed: int, read: Callable[[], R], same: Callable[[R], bool]
) -> int:
    """Flip a random bit of a file at each of some places and read it. Returns how often it was found; raises AssertionError
    where what is read is neither named as damaged nor the same.
    """
    rng, found = np.random.default_rng(seed), 0
    for place in places:
        bit = int(rng.integers(8))
        with flipped(file, place, bit):
            damage._check.cache_clear()  # as in a new process: the times of a file with a flipped bit are as before
            try:
                assert same(read()), f"{file.name}: bit {bit} of byte {place} is used"
            except DamagedError as error:
                assert str(file) in str(error), error
                found += 1
        damage.unmark(file.parent)
    return found
