"""Reads of files on this machine that others may have made: regular files only, and never more than a limit.

A size is checked first, but it may be wrong by the time of the read, and a pipe or a device has none: so a file is opened
without waiting, looked at while it is open, and read up to the limit.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

FILE_BYTES = 1 << 30  # of a picture: more than one that decode_memory_mib allows by default
_PIECE = 1 << 20


def file_pieces(path: Path, most: int = FILE_BYTES) -> Iterator[bytes]:
    """The bytes of a file, 1 MiB at a time. Raises OSError for a pipe, a device and more than `most` bytes."""
    with open(path, "rb", buffering=0, opener=_at_once) as handle:
        found = os.fstat(handle.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no regular file")
        left = most
        if found.st_size > left:
            raise _too_large(path, most)
        while piece := handle.read(_PIECE):
            left -= len(piece)
            if left < 0:
                raise _too_large(path, most)
            yield piece


def read_file(path: Path, most: int = FILE_BYTES) -> bytes:
    """The bytes of a file. Raises OSError as `file_pieces`."""
    return b"".join(file_pieces(path, most))


def leads_out(path: Path, places: Iterable[Path]) -> bool:
    """Whether a path, once its links are followed, lies in none of the places, whose links were followed.

    Raises OSError or RuntimeError for a link that leads to itself.
    """
    real = path.resolve()
    return not any(real.is_relative_to(place) for place in places)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would let it wait for ever


def _too_large(path: Path, most: int) -> OSError:
    return OSError(f"{path} is larger than {most / 2**20:,.10g} MiB")
