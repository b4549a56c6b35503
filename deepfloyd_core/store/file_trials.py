"""Tries what the store needs of a file system, in a scratch folder that is removed again. Some milliseconds.

The workspace itself is never created: where it is not there yet, its nearest parent is tried, on whose file system it
will be.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from deepfloyd_core.config.base import is_there
from deepfloyd_core.errors import StorageError
from deepfloyd_core.files import fsync_path
from deepfloyd_core.store.file_faults import flock, storage_error
from deepfloyd_core.store.locks import ELSEWHERE

_BYTES = bytes(1 << 16)  # so many are not kept in the inode, and need a block of the disk


@dataclass(frozen=True)
class Trials:
    """What a file system refuses, each in words; empty: it does it."""

    locks: str
    renames: str
    links: str
    flushes: str

    @property
    def refused(self) -> tuple[str, ...]:
        """What nothing replaces: without links files are copied."""
        return tuple(filter(None, (self.locks, self.renames, self.flushes)))


def nearest_folder(path: Path) -> Path:
    """A folder, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if is_there(each) and each.is_dir())


def try_locks(place: Path, remedy: str = ELSEWHERE) -> None:
    """Write and lock a file in a folder. Raises StorageError for what no run can do without."""
    with _scratch(place) as folder, (folder / "lock").open("wb", buffering=0) as file:
        file.write(_BYTES)
        flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, place, remedy)


def try_all(workspace: Path) -> Trials:
    """Try locks, renames over a file, hard links, and flushing a file and its folder.

    Raises StorageError if nothing can be written at all.
    """
    with _scratch(workspace) as folder:
        file, other = folder / "a", folder / "b"
        file.write_bytes(_BYTES)
        other.write_bytes(b"")

        def lock() -> None:
            with file.open("rb+") as opened:
                flock(opened.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, workspace, ELSEWHERE)

        def flush() -> None:
            fsync_path(file)
            fsync_path(folder)

        return Trials(
            locks=_refusal(lock, workspace),
            links=_refusal(lambda: os.link(file, folder / "c"), workspace),
            flushes=_refusal(flush, workspace),
            renames=_refusal(lambda: file.replace(other), workspace),
        )


def _refusal(act: Callable[[], object], workspace: Path) -> str:
    try:
        act()
    except StorageError as error:
        return str(error)
    except OSError as error:
        return str(_of_workspace(error, workspace))
    return ""


@contextmanager
def _scratch(workspace: Path) -> Iterator[Path]:
    """A folder for trials. Raises StorageError, which names the workspace, in place of OSError."""
    try:
        place = nearest_folder(workspace)
        with TemporaryDirectory(prefix=".trial-", dir=place, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as error:
        raise _of_workspace(error, workspace) from error


def _of_workspace(error: OSError, workspace: Path) -> StorageError:
    """The message for an error of a trial, whose own files nobody knows."""
    return storage_error(OSError(error.errno, error.strerror or str(error)), "written", workspace)
